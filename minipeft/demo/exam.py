"""The demo's exam: a model is measured on the held-out texts, before and after training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from minipeft.demo.data import DemoData
from minipeft.train.batches import Batches, pad_id_of
from minipeft.train.encoding import EncodedDataset, encode_prompt
from minipeft.train.evaluation import accuracy, classify, evaluate_loss
from minipeft.train.generation import generate, sampling_config
from minipeft.train.records import Record

# Tokens of a packed row; the demo's texts have about 20 each.
ROW_TOKENS = 128

# Tokens that are written after each sample prompt.
SAMPLE_TOKENS = 12


@dataclass(frozen=True)
class Measurement:
    """The quality of a model on the held-out texts. Accuracy is None where the answers are no fixed set of labels.

    Attributes:
        loss: nats per token of the answers.
        standard_error: of the accuracy.
        samples: what the model writes after some of the prompts.
    """

    loss: float
    perplexity: float
    accuracy: float | None
    standard_error: float | None
    samples: list[str]


class Exam:
    """The held-out texts, with all that is needed to measure a model on them."""

    def __init__(self, tokenizer: Any, data: DemoData, encoded: EncodedDataset) -> None:
        self.tokenizer, self.labels, self.encoded = tokenizer, data.labels, encoded
        self.records = data.held_out
        self.truth = [record.completion for record in data.held_out]
        self.majority = None
        if data.labels:
            self.majority = max(map(self.truth.count, data.labels)) / len(self.truth)
        self.samples = varied(data.held_out)
        self.pad_id = pad_id_of(tokenizer)

    def take(self, model: Any) -> Measurement:
        """Measure loss and, where the answers are labels, the accuracy of choosing the likeliest one."""
        batches = Batches(
            self.encoded.examples, 4, pad_id=self.pad_id, packing=True, max_length=row_tokens(self.encoded)
        )
        result = evaluate_loss(model, batches)
        right = None
        if self.labels:
            prompts = [record.prompt or "" for record in self.records]
            with _bar(len(prompts)) as progress:
                chosen = classify(model, self.tokenizer, prompts, self.labels, batch_size=32, progress=progress)
            right = accuracy([self.labels[i] for i in chosen.predictions], self.truth)
        samples = self.write(model)
        return Measurement(
            loss=result.loss,
            perplexity=result.perplexity,
            accuracy=right.accuracy if right else None,
            standard_error=right.standard_error if right else None,
            samples=samples,
        )

    def write(self, model: Any) -> list[str]:
        """The texts that the model writes after the sample prompts, each on one line."""
        if not self.samples:
            return []
        prompts = [encode_prompt(self.tokenizer, record.prompt or "") for record in self.samples]
        texts = generate(model, self.tokenizer, prompts, sampling_config(max_new_tokens=SAMPLE_TOKENS))
        return [" ".join(text.split()) for text in texts]


def varied(records: list[Record], count: int = 5) -> list[Record]:
    """Some records with a prompt, with different completions while there are such."""
    with_prompt = [record for record in records if record.prompt is not None]
    by_completion: dict[str | None, Record] = {}
    for record in with_prompt:
        by_completion.setdefault(record.completion, record)
    different = list(by_completion.values())
    # Spread over the labels: the first, the middle and the last.
    picked = different[:: max(1, (len(different) - 1) // (count - 1))] if len(different) >= count else different
    return (picked + with_prompt)[:count]


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, desc="measuring", unit="text", dynamic_ncols=True, leave=False) as bar:
        yield lambda done: (bar.update(done - bar.n), None)[1]


def row_tokens(*parts: EncodedDataset) -> int:
    """Tokens of a packed row: enough for the longest text."""
    return max(ROW_TOKENS, *(len(example) for part in parts for example in part.examples))

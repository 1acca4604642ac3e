"""Measuring a model: loss and perplexity, choosing among answers, accuracy with its error."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minipeft.train.batches import Batch, collate, pad_id_of
from minipeft.train.encoding import IGNORE, Example, encode_pair
from minipeft.train.loss import autocast, logits_at, token_loss_sum
from minipeft.train.models import eval_mode
from minipeft.train.processes import Processes


@dataclass(frozen=True)
class EvalResult:
    """Mean negative log-likelihood over `tokens` learned tokens, in nats, and its exponential."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """See `perplexity`."""
        return perplexity(self.loss)

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} (perplexity {self.perplexity:.4g})"


def perplexity(loss: float) -> float:
    """exp(loss) for a loss in nats a token; infinity where that overflows."""
    return math.exp(loss) if loss < 709 else math.inf


@torch.no_grad()
def evaluate_loss(
    model: Any,
    batches: Iterable[Batch],
    *,
    precision: str = "none",
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> EvalResult:
    """Token-weighted loss: every learned token counts once, whatever batch it is in. Dropout is off.

    Args:
        batches: for instance a `Batches`.
        precision: "none" or "bf16" (autocast).
        should_stop: asked between batches; when true, what has been seen is the result.
        processes: those among which the batches are shared out; the result is that of all. None for this one alone.

    Raises:
        ValueError: no learned token in any batch.
    """
    device = next(model.parameters()).device
    processes = processes or Processes()
    total, tokens = 0.0, 0
    with eval_mode(model):
        for batch, counts in processes.share(list(batches)) if processes.count > 1 else ((b, True) for b in batches):
            with autocast(device, precision):
                loss = token_loss_sum(model, batch.to(device)).item()
            if counts:
                total, tokens = total + loss, tokens + batch.loss_tokens
            if should_stop():
                break
    total, all_tokens = processes.sum(total, tokens)
    tokens = int(all_tokens)
    if not tokens:
        raise ValueError("nothing to evaluate: no batch holds a learned token")
    return EvalResult(total / tokens, tokens)


@dataclass(frozen=True)
class Classification:
    """The label chosen for each prompt.

    Attributes:
        predictions: index of the chosen label, one a prompt.
        log_likelihoods: float64 (prompts, labels), of the label text after the prompt.
    """

    predictions: list[int]
    log_likelihoods: Tensor


@torch.no_grad()
def classify(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    batch_size: int = 8,
    precision: str = "none",
    progress: Callable[[int], None] = lambda done: None,
) -> Classification:
    """Choose for every prompt the label whose text has the highest total log-likelihood after it.

    Prompt and label are tokenized as in training. Labels that share tokens share the forward pass: the labels
    " very good" and " very bad" cost one pass of prompt + " very".

    Args:
        labels: candidate completions, as in the training records (a leading space included).
        progress: called with the number of sequences done after each batch.

    Raises:
        ValueError: fewer than two labels, or a label that is the beginning of another, which no likelihood of
            its own tokens can lose to.
    """
    if len(labels) < 2:
        raise ValueError(f"classify needs at least two labels, got {list(labels)}")
    contexts = [c for i, prompt in enumerate(prompts) for c in _contexts(tokenizer, i, prompt, labels)]
    scores = torch.zeros(len(prompts), len(labels), dtype=torch.float64)
    device, pad_id = next(model.parameters()).device, pad_id_of(tokenizer)
    # Longest first: rows of a batch are then alike in length, and a lack of memory shows at once.
    contexts.sort(key=lambda c: -len(c.ids))
    with eval_mode(model):
        for at in range(0, len(contexts), batch_size):
            group = contexts[at : at + batch_size]
            batch = collate([c.example() for c in group], pad_id).to(device)
            with autocast(device, precision):
                logits = logits_at(model, batch.inputs, batch.labels != IGNORE)
            log_probs = logits.log_softmax(-1).cpu()
            for context, rows in zip(group, log_probs.split([c.positions for c in group]), strict=True):
                for label, tokens in context.labels.items():
                    scores[context.prompt, label] = rows[range(len(tokens)), tokens].double().sum()
            progress(min(at + batch_size, len(contexts)))
    return Classification(scores.argmax(-1).tolist(), scores)


@dataclass
class _Context:
    """One sequence to run: a prompt and the longest label beginning that some labels share.

    `labels` maps label index to its tokens; all but the last token of each are in `ids` after the prompt.
    """

    prompt: int
    ids: list[int]
    prompt_length: int
    labels: dict[int, list[int]]

    @property
    def positions(self) -> int:
        """Positions whose logits are needed: the prompt's last token and everything after it."""
        return len(self.ids) - self.prompt_length + 1

    def example(self) -> Example:
        """The sequence, with labels only to mark the positions whose logits are needed."""
        marks = [IGNORE] * (self.prompt_length - 1) + [0] * self.positions
        return Example(self.ids, marks)


def _contexts(tokenizer: Any, index: int, prompt: str, labels: Sequence[str]) -> list[_Context]:
    pairs = [encode_pair(tokenizer, prompt, label) for label in labels]
    prompt_ids = pairs[0][0]
    if not prompt_ids:
        raise ValueError(f"prompt {index} has no tokens: there is nothing to condition on")
    completions = [completion for _, completion in pairs]
    for a, short in enumerate(completions):
        for b, long in enumerate(completions):
            if a != b and long[: len(short)] == short:
                raise ValueError(f"label {labels[a]!r} is the beginning of label {labels[b]!r}: change one")
    contexts: list[_Context] = []
    for label in sorted(range(len(labels)), key=lambda i: -len(completions[i])):
        tokens, ids = completions[label], prompt_ids + completions[label][:-1]
        home = next((c for c in contexts if c.ids[: len(ids)] == ids), None)
        if home is None:
            home = _Context(index, ids, len(prompt_ids), {})
            contexts.append(home)
        home.labels[label] = tokens
    return contexts


@dataclass(frozen=True)
class Accuracy:
    """Share of correct predictions over `n`, beside what always answering the commonest class would give.

    Attributes:
        accuracy: correct / n.
        standard_error: of the accuracy, sqrt(p (1 - p) / n).
        majority: share of the commonest true class among these n.
    """

    accuracy: float
    standard_error: float
    majority: float
    n: int


def accuracy(predictions: Sequence[Hashable], truth: Sequence[Hashable]) -> Accuracy:
    """Compare predictions with the truth.

    Raises:
        ValueError: different lengths, or nothing to compare.
    """
    if len(predictions) != len(truth) or not truth:
        message = "predictions and truth must be of the same length, at least 1"
        raise ValueError(f"{message}: got {len(predictions)} and {len(truth)}")
    n = len(truth)
    p = sum(a == b for a, b in zip(predictions, truth, strict=True)) / n
    return Accuracy(p, math.sqrt(p * (1 - p) / n), Counter(truth).most_common(1)[0][1] / n, n)

"""One run of a comparison, in a process of its own: `python -m minipeft.compare.run`.

A process for itself has a peak of memory for itself, and takes nothing else along when it dies. Its order comes as one
line of JSON on standard input; that stays open for as long as the comparison lives, so that the run ends with it.
Left in the run's folder: `result.json`, or `failed.json` with the reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from minipeft.compare.plan import Run, Shared, train_config
from minipeft.compare.task import Encoded, Task, encode_task, read_task
from minipeft.files import remove_directory, write_text
from minipeft.train.batches import Batch, Batches, collate, pad_id_of
from minipeft.train.encoding import Example
from minipeft.train.errors import TrainingError, TrainingInterrupted
from minipeft.train.evaluation import classify
from minipeft.train.loop import Trainer
from minipeft.train.loss import learned_positions, logits_at
from minipeft.train.methods import attach, method_config, start
from minipeft.train.models import eval_mode, load_base_model, load_tokenizer, seed_everything, without_bars
from minipeft.train.report import peak_memory_bytes, read_log

RESULT, FAILED = "result.json", "failed.json"


class NotFiniteError(TrainingError, ArithmeticError):
    """The loss on texts that were not trained on is not finite."""


@dataclass(frozen=True)
class RunOrder:
    """The order for one process: a run with all that it needs.

    Attributes:
        comparison: the folder with the data.
        folder: the run's folder, which exists; all its files go there.
        labels: answers to choose from, or none.
        threads: CPU threads, None for torch's choice.
        identity: everything that decides the run's numbers; the result holds it too.
    """

    comparison: str
    folder: str
    run: Run
    shared: Shared
    seed: int
    labels: tuple[str, ...]
    threads: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The order as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunOrder:
        """The order that `to_json` wrote."""
        values = json.loads(text)
        values.update(run=Run(**values["run"]), shared=Shared(**values["shared"]), labels=tuple(values["labels"]))
        return cls(**values)


def main() -> int:
    """Do the run that standard input names; 0 when its result is there, else 1."""
    order = RunOrder.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_the_comparison, daemon=True).start()
    return 0 if attempt(order) else 1


def _end_with_the_comparison() -> None:
    # os.read, because a daemon thread that holds the lock of sys.stdin would disturb the interpreter's end.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(130)


def attempt(order: RunOrder) -> bool:
    """Do the run and write its result, or the reason why there is none. True for a result."""
    try:
        result = {"identity": order.identity, **perform(order)}
    except TrainingInterrupted:
        # Ctrl-C reaches the comparison alone, so this signal was sent to this process.
        return _give_up(order, "its process was told to stop: the same command does it again")
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, TrainingError):
            return _give_up(order, reason)
        traceback.print_exc()
        return _give_up(order, f"{type(error).__name__}: {reason}")
    write_text(Path(order.folder) / RESULT, json.dumps(result, allow_nan=False) + "\n")
    return True


def _give_up(order: RunOrder, reason: str) -> bool:
    write_text(Path(order.folder) / FAILED, json.dumps({"reason": reason}) + "\n")
    return False


def perform(order: RunOrder) -> dict[str, Any]:
    """Train the run's adapter, if it has one, and measure the model; return the numbers.

    Raises:
        TrainingError: bad settings or data, a model that cannot be loaded, a loss that is not finite.
        Exception: any other error makes the run impossible, too.
    """
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    shared = order.shared
    tokenizer = load_tokenizer(shared.model)
    task = read_task(Path(order.comparison), order.labels)
    data = encode_task(task, tokenizer, shared)
    quantize, dtype = order.run.form
    with without_bars():
        model = load_base_model(shared.model, quantize=quantize, dtype=dtype or shared.dtype, device=shared.device)
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    if not order.run.is_base:
        model, trained = _train(model, data, order, pad_id_of(tokenizer))
        result |= trained
    result |= _measure(model, tokenizer, task, data)
    if order.run.is_base:
        result["peak_memory"] = peak_memory_bytes(next(model.parameters()).device)
    return result


def _train(model: Any, data: Encoded, order: RunOrder, pad_id: int) -> tuple[Any, dict[str, Any]]:
    """Attach and train the adapter; return the model, and the numbers of the training."""
    folder = Path(order.folder)
    config = train_config(order.run, order.shared, order.seed, folder, Path(order.comparison) / "train.jsonl")
    seed_everything(order.seed)
    model = attach(model, method_config(config))
    start(model, data.train, say=lambda line: None)
    trainable, parameters = model.get_nb_trainable_parameters()
    trainer = Trainer(model, data.train, config, pad_id=pad_id)
    trainer.batches = watched = WatchedBatches(trainer.batches)
    trained = trainer.train()
    rows = [row for row in read_log(trained.log_path) if "loss" in row]
    ends = [row["seconds"] for row in rows]
    for path in folder.glob("checkpoint-*"):
        # The run is not resumed, and an optimizer's state is twice the adapter.
        remove_directory(path)
    return model, {
        "trainable": trainable,
        "parameters": parameters,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "train_seconds": trained.seconds,
        "train_loss": [row["loss"] for row in rows],
        # Without the first step, which also pays for buffers and states that are made once.
        "step_seconds": [round(b - a, 6) for a, b in itertools.pairwise(ends)] or ends,
        "peak_memory": trained.peak_memory,
        "adapter_bytes": sum(file.stat().st_size for file in trained.adapter_dir.iterdir()),
        "batches": watched.digest.hexdigest(),
    }


class WatchedBatches(Batches):
    """Batches with a sha256 over all that were taken, in their order: equal exactly if two runs took the same ones."""

    def __init__(self, batches: Batches) -> None:
        vars(self).update(vars(batches))
        self.digest = hashlib.sha256()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As `Batches.epoch`."""
        for batch in super().epoch(epoch, start):
            for name, tensor in sorted({**batch.inputs, "labels": batch.labels}.items()):
                self.digest.update(f"{name} {tuple(tensor.shape)}".encode())
                self.digest.update(tensor.numpy().tobytes())
            yield batch


def _measure(model: Any, tokenizer: Any, task: Task, data: Encoded) -> dict[str, Any]:
    """Losses of every held-out text and of every piece of the other text, and the answers chosen."""
    pad_id = pad_id_of(tokenizer)
    held_out = measure_losses(model, data.held_out.examples, pad_id, batch_size=16)
    # Few at once: in these texts every token is learned, so every token has its logits.
    other = measure_losses(model, data.windows, pad_id, batch_size=2)
    if not all(map(math.isfinite, [*held_out.sums, *other.sums])):
        raise NotFiniteError("the loss on texts that were not trained on is not finite: try a lower lr")
    result: dict[str, Any] = {"held_out": asdict(held_out), "other": asdict(other)}
    if task.labels:
        prompts = [record.prompt or "" for record in task.held_out]
        chosen = classify(model, tokenizer, prompts, task.labels, batch_size=32).predictions
        result["right"] = [task.labels[i] == record.completion for i, record in zip(chosen, task.held_out, strict=True)]
    return result


@dataclass(frozen=True)
class Losses:
    """Sum of -log p over the learned tokens of each text, in nats, and how many these are."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """The mean loss, in nats a token."""
        return math.fsum(self.sums) / sum(self.tokens)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, see `ratio_error`."""
        return ratio_error(self.sums, self.tokens)


def ratio_error(sums: Sequence[float], tokens: Sequence[int]) -> float:
    """Standard error of sum(sums) / sum(tokens) over texts drawn at random; nan for one text.

    Texts are what is drawn, not tokens, whose losses depend on one another. The error of a ratio of two means is
    that of sums - ratio * tokens, to first order (Cochran, Sampling Techniques, section 2.11).
    """
    n = len(sums)
    if n < 2:
        return math.nan
    ratio = math.fsum(sums) / sum(tokens)
    rest = math.fsum((s - ratio * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    return math.sqrt(rest * n / (n - 1)) / sum(tokens)


def change(before: Losses, after: Losses) -> tuple[float, float]:
    """Mean loss after less before, in nats a token, and its standard error over the texts, which are the same.

    Raises:
        ValueError: they are not.
    """
    if before.tokens != after.tokens:
        raise ValueError("the losses are of different texts")
    differences = [a - b for a, b in zip(after.sums, before.sums, strict=True)]
    return math.fsum(differences) / sum(before.tokens), ratio_error(differences, before.tokens)


@torch.no_grad()
def measure_losses(model: Any, examples: Sequence[Example], pad_id: int, batch_size: int) -> Losses:
    """The loss of every text, each in a row of its own."""
    device = next(model.parameters()).device
    sums, tokens = [0.0] * len(examples), [example.loss_tokens for example in examples]
    # Alike in length, so that little is padded.
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    with eval_mode(model):
        for at in range(0, len(order), batch_size):
            group = order[at : at + batch_size]
            batch = collate([examples[i] for i in group], pad_id).to(device)
            positions, labels = learned_positions(batch)
            logits = logits_at(model, batch.inputs, positions)
            losses = F.cross_entropy(logits, labels, reduction="none").double().cpu()
            for i, part in zip(group, losses.split([tokens[i] for i in group]), strict=True):
                sums[i] = part.sum().item()
    return Losses(sums, tokens)


if __name__ == "__main__":
    sys.exit(main())

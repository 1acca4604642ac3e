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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from minipeft.compare.data import Encoded, Task, encode_task, read_task
from minipeft.compare.measure import measure_losses
from minipeft.compare.plan import Run, Shared, train_config
from minipeft.files import remove_directory, write_text
from minipeft.train.batches import Batch, Batches, pad_id_of
from minipeft.train.errors import TrainingError, TrainingInterrupted
from minipeft.train.evaluation import classify
from minipeft.train.loop import Trainer
from minipeft.train.methods import attach, method_config, start
from minipeft.train.models import load_base_model, load_tokenizer, seed_everything, without_bars
from minipeft.train.report import peak_memory_bytes, read_log

RESULT, FAILED = "result.json", "failed.json"


class NotFiniteError(TrainingError, ArithmeticError):
    """What was measured is no number."""


@dataclass(frozen=True)
class Order:
    """What a process has to do.

    Attributes:
        comparison: the folder with the data.
        folder: where the run leaves its files; it exists.
        labels: answers to choose from, or none.
        threads: CPU threads, None for torch's choice.
        identity: what decides the numbers; kept beside them.
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
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        """The opposite of `to_json`."""
        values = json.loads(text)
        values.update(run=Run(**values["run"]), shared=Shared(**values["shared"]), labels=tuple(values["labels"]))
        return cls(**values)


def main() -> int:
    """Do what standard input says; 0 when the result is there."""
    order = Order.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_the_comparison, daemon=True).start()
    return 0 if attempt(order) else 1


def _end_with_the_comparison() -> None:
    # A raw read: a daemon thread that holds the lock of sys.stdin would disturb the interpreter's end.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(130)


def attempt(order: Order) -> bool:
    """Do the run and leave its result, or the reason why there is none."""
    try:
        result = {"identity": order.identity, **perform(order)}
    except TrainingInterrupted:
        # Ctrl-C reaches the comparison alone: this process had a signal of its own.
        return _give_up(order, "its process was told to stop: the same command does it again")
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, TrainingError):
            return _give_up(order, reason)
        traceback.print_exc()
        return _give_up(order, f"{type(error).__name__}: {reason}")
    write_text(Path(order.folder) / RESULT, json.dumps(result, allow_nan=False) + "\n")
    return True


def _give_up(order: Order, reason: str) -> bool:
    write_text(Path(order.folder) / FAILED, json.dumps({"reason": reason}) + "\n")
    return False


def perform(order: Order) -> dict[str, Any]:
    """Train, where there is something to train, and measure.

    Raises:
        TrainingError, ValueError, ...: whatever makes the run impossible.
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


def _train(model: Any, data: Encoded, order: Order, pad_id: int) -> tuple[Any, dict[str, Any]]:
    """The model with its adapter trained, and what that took."""
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
        # The first step also pays for what is made once.
        "step_seconds": [round(b - a, 6) for a, b in itertools.pairwise(ends)] or ends,
        "peak_memory": trained.peak_memory,
        "adapter_bytes": sum(file.stat().st_size for file in trained.adapter_dir.iterdir()),
        "batches": watched.digest.hexdigest(),
    }


class WatchedBatches(Batches):
    """Batches, with a sha256 of all that were taken, in their order: equal exactly when two runs saw the same."""

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
    # Few at once: here every token has its logits.
    other = measure_losses(model, data.windows, pad_id, batch_size=2)
    if not all(map(math.isfinite, [*held_out.sums, *other.sums])):
        raise NotFiniteError("the loss on texts that were not trained on is not finite: try a lower lr")
    result: dict[str, Any] = {"held_out": asdict(held_out), "other": asdict(other)}
    if task.labels:
        prompts = [record.prompt or "" for record in task.held_out]
        chosen = classify(model, tokenizer, prompts, task.labels, batch_size=32).predictions
        result["right"] = [task.labels[i] == record.completion for i, record in zip(chosen, task.held_out, strict=True)]
    return result


if __name__ == "__main__":
    sys.exit(main())

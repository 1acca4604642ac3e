"""From the results of the runs to the rows of the table."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minipeft.commands.inspect import size
from minipeft.compare.data import Task
from minipeft.compare.measure import Losses, change, deviation, exp, quantile, share_error
from minipeft.compare.plan import Run, Shared
from minipeft.train.models import resolve_device

# Of the seconds a step, beside the median.
LOW, HIGH = 0.1, 0.9


@dataclass(frozen=True)
class Outcome:
    """What became of one run with one seed: a result (see `compare_run.perform`), or the reason why there is none."""

    run: Run
    seed: int
    result: Mapping[str, Any] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table: a run, its seeds taken together. What does not exist is None.

    Attributes:
        seeds: those that were finished.
        accuracy, loss, other_after, other_change: means over the seeds.
        *_error: standard error over the texts. *_deviation: standard deviation over the seeds.
        loss, other_*: nats a token; `other_change` is after less before, on the same pieces of text.
        step_*: seconds, over the steps of all seeds.
        peak_memory: bytes, the largest of the seeds.
        train_loss: of the first seed, step by step.
        reason: why there is nothing, or which seeds are missing.
    """

    name: str
    is_base: bool
    settings: Mapping[str, Any]
    seeds: tuple[int, ...] = ()
    accuracy: float | None = None
    accuracy_error: float | None = None
    accuracy_deviation: float | None = None
    loss: float | None = None
    loss_error: float | None = None
    loss_deviation: float | None = None
    trainable: int | None = None
    adapter_bytes: int | None = None
    step_median: float | None = None
    step_low: float | None = None
    step_high: float | None = None
    train_seconds: float | None = None
    steps: int | None = None
    threads: int | None = None
    peak_memory: int | None = None
    other_before: float | None = None
    other_after: float | None = None
    other_change: float | None = None
    other_change_error: float | None = None
    other_change_deviation: float | None = None
    train_loss: tuple[float, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Table:
    """All rows, and what a reader has to know to read them.

    Attributes:
        labels: how many answers there are to choose from, 0 for free text.
        majority: accuracy of always giving the commonest answer.
        notes: sentences.
    """

    title: str
    notes: list[str]
    labels: int
    majority: float | None
    rows: list[Row]
    failures: list[str]


def make_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row a run, in the order of the outcomes."""
    bases = {o.run.form: o.result for o in outcomes if o.run.is_base and o.result is not None}
    names = dict.fromkeys(outcome.run.name for outcome in outcomes)
    return [_row([o for o in outcomes if o.run.name == name], bases) for name in names]


def _row(outcomes: Sequence[Outcome], bases: Mapping[Any, Mapping[str, Any]]) -> Row:
    run = outcomes[0].run
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    failed = [f"seed {o.seed}: {o.reason}" if len(outcomes) > 1 else str(o.reason) for o in outcomes if o.reason]
    row = Row(run.name, run.is_base, run.settings, reason="; ".join(failed) or None)
    if not results:
        return row
    seeds = tuple(outcome.seed for outcome in outcomes if outcome.result is not None)
    values: dict[str, Any] = {"seeds": seeds, "peak_memory": max(result["peak_memory"] for result in results)}
    values |= _held_out(results) | _other(results, bases.get(run.form))
    values["threads"] = results[0]["threads"]
    if not run.is_base:
        values |= _training(results)
    return dataclasses.replace(row, **values)


def _held_out(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [Losses(**result["held_out"]) for result in results]
    mean = _mean_losses(losses)
    values: dict[str, Any] = {
        "loss": mean.mean,
        "loss_error": mean.standard_error,
        "loss_deviation": deviation([one.mean for one in losses]),
    }
    if "right" in results[0]:
        # A text counts by how many of the seeds got it right.
        right = [sum(column) / len(results) for column in zip(*(result["right"] for result in results), strict=True)]
        values["accuracy"] = sum(right) / len(right)
        values["accuracy_error"] = share_error(right)
        shares = [sum(result["right"]) / len(right) for result in results]
        values["accuracy_deviation"] = deviation(shares)
    return values


def _other(results: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> dict[str, Any]:
    losses = [Losses(**result["other"]) for result in results]
    mean = _mean_losses(losses)
    values: dict[str, Any] = {"other_after": mean.mean}
    if base is not None:
        before = Losses(**base["other"])
        difference, error = change(before, mean)
        values |= {"other_before": before.mean, "other_change": difference, "other_change_error": error}
        values["other_change_deviation"] = deviation([change(before, one)[0] for one in losses])
    return values


def _training(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [value for result in results for value in result["step_seconds"]]
    first = results[0]
    return {
        "trainable": first["trainable"],
        "adapter_bytes": max(result["adapter_bytes"] for result in results),
        "step_median": quantile(seconds, 0.5),
        "step_low": quantile(seconds, LOW),
        "step_high": quantile(seconds, HIGH),
        "train_seconds": sum(result["train_seconds"] for result in results) / len(results),
        "steps": first["steps"],
        "train_loss": tuple(first["train_loss"]),
    }


def _mean_losses(losses: Sequence[Losses]) -> Losses:
    """Text by text the mean over the seeds."""
    sums = [sum(column) / len(losses) for column in zip(*(one.sums for one in losses), strict=True)]
    return Losses(sums, losses[0].tokens)


def make_table(outcomes: Sequence[Outcome], task: Task, shared: Shared) -> Table:
    """The table and what belongs to it."""
    rows = make_rows(outcomes)
    answers = [record.completion for record in task.held_out]
    majority = max(map(answers.count, task.labels)) / len(answers) if task.labels else None
    return Table(
        title=f"Methods compared on {Path(shared.model).name}",
        notes=_notes(rows, outcomes, task, shared, majority),
        labels=len(task.labels),
        majority=majority,
        rows=rows,
        failures=[f"{row.name} failed: {row.reason}" for row in rows if row.reason],
    )


def _notes(
    rows: Sequence[Row], outcomes: Sequence[Outcome], task: Task, shared: Shared, majority: float | None
) -> list[str]:
    seeds = sorted({outcome.seed for outcome in outcomes if not outcome.run.is_base})
    steps = next((row.steps for row in rows if row.steps is not None), None)
    unit = f"packed rows of {shared.max_length} tokens" if shared.packing else "texts"
    length = f"; {steps} steps of {shared.batch_size} {unit}, the same for all" if steps else ""
    threads = next((row.threads for row in rows if row.threads is not None), None)
    cores = f"{threads} thread" + ("s" if threads != 1 else "")
    device = torch.cuda.get_device_name() if resolve_device(shared.device).type == "cuda" else _processor()
    measured = f"Accuracy (always the same answer: {100 * majority:.1f} %) and p" if majority is not None else "P"
    notes = [
        *task.about.split("\n"),
        f"{Path(shared.model).name}: {len(task.train)} texts to learn from, {len(task.held_out)} held out{length}; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}.",
        f"{measured}erplexity of the answers: held-out texts, ± standard error over them.",
        "Seconds a step: median (10 % to 90 % of the steps). Peak memory: of a process that loads the model and trains "
        "(base: and measures).",
        "Other text: perplexity without and with the adapter; the change ± standard error over pieces of the text.",
        f"Measured with {cores} on {device}, torch {torch.__version__}, the model in {shared.dtype}.",
    ]
    return [*notes, *(f"{row.name}: {_settings(row)}." for row in rows if not row.is_base)]


def _settings(row: Row) -> str:
    """What is particular to a run."""
    settings = dict(row.settings)
    if settings["method"] == row.name:
        del settings["method"]
    # What differs most comes first.
    first = {key: settings.pop(key) for key in ("method", "lr") if key in settings}
    shown = {**first, **settings.pop("method_args", {}), **settings}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def _processor() -> str:
    """The processor's name, as far as the system tells it, and its cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores of {name}"


def say_outcome(outcome: Outcome) -> str:
    """One line on what a run gave."""
    if outcome.result is None:
        return f"failed: {outcome.reason}"
    row = make_rows([outcome])[0]
    assert row.loss is not None
    parts = [f"perplexity {exp(row.loss):.3g}", f"peak memory {size(row.peak_memory or 0)}"]
    if row.accuracy is not None and row.accuracy_error is not None:
        parts.insert(0, f"accuracy {100 * row.accuracy:.1f} % ± {100 * row.accuracy_error:.1f}")
    if row.step_median is not None:
        parts.append(f"{row.steps} steps, {row.step_median:.3g} s each, {row.train_seconds:.0f} s in all")
    return ", ".join(parts)

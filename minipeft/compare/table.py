"""The table of a comparison: from the results of the runs to rows, and these as text for a document or a terminal.

Every text's loss is kept: a mean over few texts says little without its error, and the change from one model to
another is known far better than either loss, because both read the same texts.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipeft.compare.plan import Run, Shared
from minipeft.compare.run import Losses, change
from minipeft.compare.task import Task
from minipeft.files import size, write_text
from minipeft.machine import processor
from minipeft.train.evaluation import perplexity
from minipeft.train.models import resolve_device

# Beside the median step time: the times that 10 % and 90 % of the steps stay below.
LOW, HIGH = 0.1, 0.9


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run with one seed: a result (see `run.perform`), or the reason why there is none."""

    run: Run
    seed: int
    result: Mapping[str, Any] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table: a run, its seeds taken together. Numbers that do not exist are None.

    Attributes:
        seeds: those that were finished.
        accuracy, loss, other_after, other_change: means over the seeds.
        *_error: standard error over the texts. *_deviation: standard deviation over the seeds.
        loss, other_*: nats a token; `other_change` is after less before, on the same pieces of text.
        step_*: seconds, over the steps of all seeds.
        peak_memory: bytes, the largest of the seeds.
        train_loss: of the first seed, step by step.
        reason: the reason why there are no numbers, or why seeds are missing.
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
    """All rows, and the notes that explain them.

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
    values: dict[str, Any] = {
        "seeds": tuple(outcome.seed for outcome in outcomes if outcome.result is not None),
        "threads": results[0]["threads"],
        "peak_memory": max(result["peak_memory"] for result in results),
    }
    values |= _held_out(results) | _other(results, bases.get(run.form))
    if not run.is_base:
        values |= _training(results)
    return dataclasses.replace(row, **values)


def _held_out(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [Losses(**result["held_out"]) for result in results]
    mean = _mean_losses(losses)
    values: dict[str, Any] = {"loss": mean.mean, "loss_error": mean.standard_error}
    values["loss_deviation"] = deviation([one.mean for one in losses])
    if "right" in results[0]:
        # A text counts by how many of the seeds got it right.
        right = [sum(column) / len(results) for column in zip(*(result["right"] for result in results), strict=True)]
        values |= {"accuracy": sum(right) / len(right), "accuracy_error": share_error(right)}
        values["accuracy_deviation"] = deviation([sum(result["right"]) / len(right) for result in results])
    return values


def _other(results: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> dict[str, Any]:
    losses = [Losses(**result["other"]) for result in results]
    mean = _mean_losses(losses)
    if base is None:
        return {"other_after": mean.mean}
    before = Losses(**base["other"])
    difference, error = change(before, mean)
    return {
        "other_before": before.mean,
        "other_after": mean.mean,
        "other_change": difference,
        "other_change_error": error,
        "other_change_deviation": deviation([change(before, one)[0] for one in losses]),
    }


def _training(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [value for result in results for value in result["step_seconds"]]
    low, median, high = np.quantile(seconds, [LOW, 0.5, HIGH]).tolist()
    first = results[0]
    return {
        "trainable": first["trainable"],
        "adapter_bytes": max(result["adapter_bytes"] for result in results),
        "step_median": median,
        "step_low": low,
        "step_high": high,
        "train_seconds": sum(result["train_seconds"] for result in results) / len(results),
        "steps": first["steps"],
        "train_loss": tuple(first["train_loss"]),
    }


def _mean_losses(losses: Sequence[Losses]) -> Losses:
    """Text by text the mean over the seeds."""
    sums = [sum(column) / len(losses) for column in zip(*(one.sums for one in losses), strict=True)]
    return Losses(sums, losses[0].tokens)


def share_error(right: Sequence[float]) -> float:
    """Standard error of the mean of `right`, each 0 or 1 (or a mean of such): sqrt(p (1 - p) / n) for 0 and 1."""
    mean = math.fsum(right) / len(right)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in right)) / len(right)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


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
    device = torch.cuda.get_device_name() if resolve_device(shared.device).type == "cuda" else processor()
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
    """The settings of a run as text, those first in which runs differ most."""
    settings = dict(row.settings)
    if settings["method"] == row.name:
        del settings["method"]
    first = {key: settings.pop(key) for key in ("method", "lr") if key in settings}
    shown = {**first, **settings.pop("method_args", {}), **settings}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def header(table: Table) -> list[str]:
    """The names of the columns."""
    measured = ["accuracy", "perplexity"] if table.labels else ["perplexity"]
    return [
        *("method", *measured, "trained", "adapter", "seconds a step", "peak memory"),
        *("other text: before", "after", "change"),
    ]


def cells(row: Row, table: Table) -> list[str]:
    """A row as text, one cell a column."""
    if row.loss is None:
        return [row.name, f"failed: {row.reason}", *[""] * (len(header(table)) - 2)]
    measured = [_perplexity(row)]
    if table.labels:
        assert row.accuracy is not None and row.accuracy_error is not None
        shown = f"{100 * row.accuracy:.1f} %"
        measured.insert(0, _with_errors(shown, 100, row.accuracy_error, row.accuracy_deviation, 1))
    return [
        f"{row.name} (incomplete: {row.reason})" if row.reason else row.name,
        *measured,
        "-" if row.trainable is None else f"{row.trainable:,}",
        "-" if row.adapter_bytes is None else size(row.adapter_bytes),
        "-" if row.step_median is None else f"{row.step_median:.3g} ({row.step_low:.3g} to {row.step_high:.3g})",
        size(row.peak_memory or 0),
        "-" if row.other_before is None else _plain(perplexity(row.other_before)),
        "-" if row.other_after is None else _plain(perplexity(row.other_after)),
        "-" if row.other_change is None else _change(row),
    ]


def _with_errors(shown: str, scale: float, error: float, deviation: float | None, digits: int) -> str:
    """A number as it is shown, with its error and its deviation over the seeds, both times `scale`."""
    seeds = "" if deviation is None else f" (seeds ± {scale * deviation:,.{digits}f})"
    return f"{shown} ± {scale * error:,.{digits}f}{seeds}"


def _perplexity(row: Row) -> str:
    """exp(loss) with its error, to first order that of the loss times exp(loss)."""
    assert row.loss is not None and row.loss_error is not None
    value = perplexity(row.loss)
    if not math.isfinite(value):
        return _plain(value)
    # As many places as the error has with one digit that matters.
    error = value * row.loss_error
    digits = min(4, max(0, -math.floor(math.log10(error)))) if error > 0 else 3
    return _with_errors(f"{value:,.{digits}f}", value, row.loss_error, row.loss_deviation, digits)


def _change(row: Row) -> str:
    """The rise of the perplexity in percent: exp(change of the loss) - 1."""
    assert row.other_change is not None and row.other_change_error is not None
    ratio = perplexity(row.other_change)
    digits = 1 if abs(ratio - 1) < 1 else 0
    shown = f"{100 * (ratio - 1):+,.{digits}f} %"
    return _with_errors(shown, 100 * ratio, row.other_change_error, row.other_change_deviation, digits)


def _plain(value: float) -> str:
    """A number with three significant digits, without an exponent below a million."""
    if not math.isfinite(value) or value >= 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.2f}"


def markdown(table: Table) -> str:
    """The table as it can stand in a document, its notes below."""
    lines = [header(table), ["---", *["---:"] * (len(header(table)) - 1)]]
    lines += [[_escaped(cell) for cell in cells(row, table)] for row in table.rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n" + "".join(f"- {_escaped(note)}\n" for note in table.notes)


def _escaped(cell: str) -> str:
    """The text of a cell with its marks escaped, so that none ends the cell or is read as markup."""
    for mark in "\\|*_<`[":
        cell = cell.replace(mark, "\\" + mark)
    return cell


def plain_text(table: Table) -> str:
    """The table for a terminal, its columns aligned; what failed is said in full below."""
    lines = [header(table), *(cells(row, table) for row in table.rows)]
    lines = [[cell if len(cell) <= 40 else cell[:37] + "..." for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def write_table(table: Table, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write `table.md`, `results.json` and, with a line a run and seed, `results.csv`."""
    write_text(folder / "table.md", markdown(table))
    singles = [_single(outcome, outcomes) for outcome in outcomes]
    content = {**dataclasses.asdict(table), "runs": singles}
    write_text(folder / "results.json", json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(singles[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(singles)
    write_text(folder / "results.csv", buffer.getvalue())


def _single(outcome: Outcome, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of one run with one seed."""
    bases = [other for other in outcomes if other.run.is_base and other is not outcome]
    row = dataclasses.asdict(make_rows([outcome, *bases])[0])
    for name in ("settings", "seeds", "train_loss", *(name for name in row if name.endswith("_deviation"))):
        del row[name]
    settings = outcome.run.settings
    about = {"seed": outcome.seed, "method": settings.get("method"), "lr": settings.get("lr")}
    for name in ("loss", "other_before", "other_after"):
        value = row[name]
        about[name.replace("loss", "held_out") + "_perplexity"] = None if value is None else perplexity(value)
    return {"name": row.pop("name"), **about, **row}


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

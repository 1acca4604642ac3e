"""The table of a comparison as text: for a document, for a terminal, for a program."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minipeft.commands.inspect import size
from minipeft.compare.measure import exp
from minipeft.compare.rows import Outcome, Row, Table, make_rows
from minipeft.files import write_text


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
        measured.insert(0, _percent(row.accuracy, row.accuracy_error, row.accuracy_deviation))
    return [
        f"{row.name} (incomplete: {row.reason})" if row.reason else row.name,
        *measured,
        "-" if row.trainable is None else f"{row.trainable:,}",
        "-" if row.adapter_bytes is None else size(row.adapter_bytes),
        "-" if row.step_median is None else _seconds(row),
        size(row.peak_memory or 0),
        "-" if row.other_before is None else _plain(exp(row.other_before)),
        "-" if row.other_after is None else _plain(exp(row.other_after)),
        "-" if row.other_change is None else _change(row),
    ]


def _percent(value: float | None, error: float | None, spread: float | None) -> str:
    assert value is not None and error is not None
    seeds = "" if spread is None else f" (seeds ± {100 * spread:.1f})"
    return f"{100 * value:.1f} % ± {100 * error:.1f}{seeds}"


def _perplexity(row: Row) -> str:
    """exp(loss) with its error, to first order that of the loss times exp(loss)."""
    assert row.loss is not None and row.loss_error is not None
    value = exp(row.loss)
    shown = [value, value * row.loss_error] + ([] if row.loss_deviation is None else [value * row.loss_deviation])
    if not math.isfinite(value):
        return _plain(value)
    # As many places as the error has with one digit that matters.
    digits = min(4, max(0, -math.floor(math.log10(shown[1])))) if shown[1] > 0 else 3
    texts = [f"{number:,.{digits}f}" for number in shown]
    return " ± ".join(texts[:2]) + (f" (seeds ± {texts[2]})" if texts[2:] else "")


def _change(row: Row) -> str:
    """By how much the perplexity rose, in percent: exp(change of the loss) - 1."""
    assert row.other_change is not None and row.other_change_error is not None
    ratio = exp(row.other_change)
    spread = row.other_change_deviation
    digits = 1 if abs(ratio - 1) < 1 else 0
    seeds = "" if spread is None else f" (seeds ± {100 * ratio * spread:,.{digits}f})"
    return f"{100 * (ratio - 1):+,.{digits}f} % ± {100 * ratio * row.other_change_error:,.{digits}f}{seeds}"


def _seconds(row: Row) -> str:
    return f"{row.step_median:.3g} ({row.step_low:.3g} to {row.step_high:.3g})"


def _plain(value: float) -> str:
    """Three digits that matter, without an exponent below a million."""
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
    """Nothing in a cell may end it, or be read as markup."""
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
    """One run with one seed, in numbers."""
    bases = [other for other in outcomes if other.run.is_base and other is not outcome]
    row = dataclasses.asdict(make_rows([outcome, *bases])[0])
    for name in ("settings", "seeds", "train_loss", *(name for name in row if name.endswith("_deviation"))):
        del row[name]
    settings = outcome.run.settings
    about = {"seed": outcome.seed, "method": settings.get("method"), "lr": settings.get("lr")}
    for name in ("loss", "other_before", "other_after"):
        value = row[name]
        about[name.replace("loss", "held_out") + "_perplexity"] = None if value is None else exp(value)
    return {"name": row.pop("name"), **about, **row}


def _finite(value: Any) -> Any:
    """Numbers that JSON cannot hold as null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

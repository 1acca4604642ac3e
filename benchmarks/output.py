"""Results in three forms: a table to read, a CSV file that reads back as it was written, a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.harness import OURS, Case, Row
from minipeft.files import atomic_path, write_text

HEADER = ("", "median", "20%..80%", "ours / its", "GB/s", "GFLOP/s", "of limit", "error")
_TYPES = {f.name: str(f.type) for f in fields(Row)}


def table(rows: Sequence[Row], quick: bool = False) -> str:
    """Rows as text, those of one case together.

    Args:
        quick: leave out what one call of a small size says nothing about.
    """
    shown = HEADER if not quick else tuple(name for name in HEADER if name in ("", "median", "error"))
    text, title = [], ""
    cells = {id(row): _cells(row) for row in rows if row.median is not None}
    names = max((len(row.candidate) for row in rows), default=0)
    widths = {name: max([len(name), *(len(c[name]) for c in cells.values())]) for name in shown[1:]}
    text.append("  ".join([" " * (names + 2), *(f"{name:>{widths[name]}}" for name in shown[1:])]))
    for row in rows:
        if row.status == "missing":
            continue
        if title != case_title(row):
            title = case_title(row)
            text.append(f"\n{title}")
        if id(row) in cells:
            line = [f"{cells[id(row)][name]:>{widths[name]}}" for name in shown[1:]]
        else:
            line = [f"{row.status}: {row.note}"]
        text.append("  ".join([f"  {row.candidate:<{names}}", *line]).rstrip())
    absent = {row.candidate: row.note for row in rows if row.status == "missing"}
    text += [f"\nnot measured: {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(text)


def case_title(row: Row | Case) -> str:
    """The title of a case: "nf4_matmul forward 4096x4096 M=1 bfloat16"."""
    return " ".join(part for part in (row.op, row.variant, row.shape, row.dtype) if part)


def _cells(row: Row) -> dict[str, str]:
    """The cells of a row that was timed, by the names of HEADER."""
    return {
        "median": amount(row.median, row.unit),
        "20%..80%": f"{amount(row.q20, row.unit)}..{amount(row.q80, row.unit)}",
        "ours / its": "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_q20:.2f}..{row.ratio_q80:.2f})",
        "GB/s": "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
        "GFLOP/s": "" if row.gflop_per_s is None else f"{row.gflop_per_s:.4g}",
        "of limit": "" if row.share is None else f"{row.share:.0%}",
        "error": "" if row.error is None else f"{row.error:.1e}",
    }


def amount(value: float | None, unit: str) -> str:
    """Three digits with their unit, of microseconds ("us") or "bytes"; "" for None."""
    if unit == "us" or value is None:
        return duration(value)
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def duration(microseconds: float | None) -> str:
    """Three digits, in microseconds, milliseconds or seconds; "" for None."""
    if microseconds is None:
        return ""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def write_csv(path: Path, rows: Sequence[Row], environment: Mapping[str, str]) -> None:
    """Lines "# name: value" of the environment, then the rows; atomically."""
    buffer = io.StringIO()
    for name, value in environment.items():
        buffer.write(f"# {name}: {' '.join(value.split())}\n")
    writer = csv.DictWriter(buffer, list(_TYPES), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _written(value) for name, value in asdict(row).items()})
    write_text(path, buffer.getvalue())


def _written(value: Any) -> Any:
    # Seven digits, more than any clock here is worth.
    return f"{value:.7g}" if isinstance(value, float) else value


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Read back the rows and the environment that `write_csv` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    notes = [line[2:] for line in lines if line.startswith("# ")]
    environment = dict(note.split(": ", 1) for note in notes)
    body = [line for line in lines if not line.startswith("# ")]
    return [Row(**{k: _read(k, v) for k, v in row.items()}) for row in csv.DictReader(body)], environment


def _read(name: str, text: str) -> Any:
    if "float" in _TYPES[name]:
        return float(text) if text else None
    return int(text) if _TYPES[name] == "int" else text


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw the medians of all cases, 20% to 80% as a bar, and our floor as a grey tick; atomically, as PNG.

    Times and bytes get a panel each.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # The object interface with its own canvas: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [[row for row in rows if row.unit == unit] for unit in dict.fromkeys(row.unit for row in rows)]
    heights = [len({case_title(row) for row in panel}) for panel in panels]
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(panels) + 0.34 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = {"height_ratios": [height + 1 for height in heights] or None}
    axes = figure.subplots(max(1, len(panels)), squeeze=False, gridspec_kw=ratios)
    for own, panel in zip(axes[:, 0], panels, strict=False):
        _draw(own, panel)
    axes[0, 0].set_title(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(case_title(row) for row in rows))
    timed = [row for row in rows if row.median is not None]
    names = list(dict.fromkeys(row.candidate for row in timed))
    for i, name in enumerate(names):
        own = [row for row in timed if row.candidate == name]
        # Candidates of a case lie side by side, ours on top.
        heights = [cases.index(case_title(row)) + 0.6 * ((i + 0.5) / len(names) - 0.5) for row in own]
        middles = [row.median or 0.0 for row in own]
        below = [m - (row.q20 or m) for m, row in zip(middles, own, strict=True)]
        above = [(row.q80 or m) - m for m, row in zip(middles, own, strict=True)]
        axes.errorbar(middles, heights, xerr=[below, above], fmt="o", markersize=5, color=f"C{i}", label=name)
    floors = [(row.floor, cases.index(case_title(row))) for row in timed if row.candidate == OURS and row.floor]
    if floors:
        axes.plot(*_columns(floors), "|", color="grey", markersize=14, label=f"least possible for {OURS}")
    unit = "microseconds" if not rows or rows[0].unit == "us" else rows[0].unit
    axes.set(xscale="log", xlabel=f"{unit} (median, 20% to 80%)", ylim=(len(cases) - 0.5, -0.5))
    axes.set_yticks(range(len(cases)), [case.partition(" ")[2] for case in cases], fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    if timed:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _columns(pairs: Iterable[tuple[float, int]]) -> tuple[list[float], list[int]]:
    pairs = list(pairs)
    return [x for x, _ in pairs], [y for _, y in pairs]

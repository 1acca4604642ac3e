"""A comparison as pictures: one PNG, and one plain HTML page that needs no other file and no network."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipeft.compare.table import Row, Table, cells, header
from minipeft.files import atomic_path, size, write_text
from minipeft.train.evaluation import perplexity
from minipeft.train.report import running_mean

BAR, BASE = "tab:blue", "0.6"


def write_pages(table: Table, folder: Path) -> None:
    """Write `comparison.png` and `comparison.html`."""
    import matplotlib

    # Names are plain text, also those with a dollar sign; drawn as paths they look the same everywhere.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "minipeft"}):
        figure = draw(table)
        with atomic_path(folder / "comparison.png") as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    # Without the XML header, which has no place inside a page.
    picture = svg.getvalue()[svg.getvalue().index("<svg") :]
    write_text(folder / "comparison.html", page(table, picture))


def draw(table: Table) -> Any:
    """A matplotlib figure: a panel for each thing that is compared."""
    # The object interface with its own canvas: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in table.rows if row.loss is not None]
    trained = [row for row in rows if not row.is_base]
    figure = Figure(figsize=(13, 3.4 + 0.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    held_out, forgetting, curves, sizes, steps, memory = figure.subplots(2, 3).flat

    if table.labels:
        values, errors = ([100 * (x or 0) for x in column] for column in _columns(rows, "accuracy", "accuracy_error"))
        _bars(held_out, rows, "held-out accuracy (%); dotted: one answer always", values, errors)
        held_out.axvline(100 * (table.majority or 0), color="0.3", linewidth=1, linestyle=":")
    else:
        values, errors = _columns(rows, "loss", "loss_error")
        _bars(held_out, rows, "held-out loss (nats a token)", values, errors)

    compared = [row for row in rows if row.other_change is not None]
    changes, errors = _columns(compared, "other_change", "other_change_error")
    ratios = [perplexity(change) for change in changes]
    errors = [ratio * error for ratio, error in zip(ratios, errors, strict=True)]
    _bars(forgetting, compared, "other text: perplexity after / before", ratios, errors, start=1)
    if ratios and max(ratios) > 3:
        _logarithmic(forgetting.xaxis)

    _curves(curves, trained)

    parameters, nbytes = _columns(trained, "trainable", "adapter_bytes")
    bars = _bars(sizes, trained, "trained parameters, and the adapter on disk", parameters)
    sizes.bar_label(bars, list(map(size, nbytes)), padding=3, fontsize="small")
    if trained:
        _logarithmic(sizes.xaxis)
        # A bar on a logarithmic axis has no beginning: it starts a decade below the smallest value.
        sizes.set_xlim(max(1, min(parameters)) / 10, max(1, *parameters) * 30)

    middle, low, high = _columns(trained, "step_median", "step_low", "step_high")
    spread = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
    _bars(steps, trained, "seconds a step (median, 10 % to 90 %)", middle, spread)

    (peaks,) = _columns(rows, "peak_memory")
    bars = _bars(memory, rows, "peak memory (GB)", [peak / 1e9 for peak in peaks])
    memory.bar_label(bars, fmt="%.2f", padding=3, fontsize="small")
    memory.margins(x=0.12)
    return figure


def _columns(rows: Sequence[Row], *names: str) -> list[list[float]]:
    """The values of the rows under each name, 0 for None."""
    return [[getattr(row, name) or 0 for row in rows] for name in names]


def _bars(
    axes: Any, rows: Sequence[Row], label: str, values: Sequence[float], errors: Any = None, start: float = 0
) -> Any:
    """A horizontal bar a row, from `start` to its value; those of base models are gray."""
    colors = [BASE if row.is_base else BAR for row in rows]
    widths = [value - start for value in values]
    places = range(len(rows))
    bars = axes.barh(places, widths, left=start, xerr=errors, color=colors, ecolor="0.2", capsize=3, height=0.65)
    if start:
        axes.axvline(start, color="0.3", linewidth=1)
    axes.set_yticks(places, [_short(row.name) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return bars


def _curves(axes: Any, rows: Sequence[Row]) -> None:
    """Training loss, step by step, as a running mean."""
    for row in rows:
        losses = running_mean(running_mean(row.train_loss))
        axes.plot(range(1, len(losses) + 1), losses, label=_short(row.name), linewidth=1.5)
    axes.set(xlabel="optimizer step", ylabel="training loss (running mean)")
    values = [loss for row in rows for loss in row.train_loss]
    if values and min(values) > 0:
        _logarithmic(axes.yaxis, subs=(1, 2, 5))
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(frameon=False, fontsize="small")


def _logarithmic(axis: Any, subs: tuple[int, ...] = (1,)) -> None:
    """A logarithmic axis whose ticks are plain numbers, not powers of ten: a thousand is 1k."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    units = (("M", 1e6), ("k", 1e3), ("", 1.0))
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: next(f"{value / by:g}{unit}" for unit, by in units if value >= by or not unit))
    )


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def page(table: Table, picture: str) -> str:
    """The HTML page: the table, the picture, the notes.

    Args:
        picture: an SVG element.
    """
    lines = [cells(row, table) for row in table.rows]
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header(table))
    notes = "\n".join(f"<p>{html.escape(note)}</p>" for note in (*table.notes, *table.failures))
    title = html.escape(table.title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif }} td, th {{ padding: 0.3em 0.8em; text-align: left }}</style></head>
<body>
<h1>{title}</h1>
<table>
<tr>{head}</tr>
{body}
</table>
{picture}
{notes}
</body>
</html>
"""

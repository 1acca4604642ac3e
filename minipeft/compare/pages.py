"""The comparison as pictures: one PNG, and one HTML page that needs no other file and no network."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minipeft.commands.inspect import size
from minipeft.compare.measure import exp
from minipeft.compare.rows import Row, Table
from minipeft.compare.table import cells, header
from minipeft.files import atomic_path, write_text
from minipeft.train.report import running_mean

BAR, BASE = "tab:blue", "0.6"


def write_pages(table: Table, folder: Path) -> None:
    """Write `comparison.png` and `comparison.html`."""
    import matplotlib

    # Names are text, also those with a dollar sign; as paths they look the same everywhere.
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
    panels = figure.subplots(2, 3)
    _held_out(panels[0][0], table, rows)
    _forgetting(panels[0][1], [row for row in rows if row.other_change is not None])
    _curves(panels[0][2], trained)
    _sizes(panels[1][0], trained)
    _steps(panels[1][1], trained)
    bars = _bars(panels[1][2], rows, lambda row: (row.peak_memory or 0) / 1e9, "peak memory (GB)")
    panels[1][2].bar_label(bars, fmt="%.2f", padding=3, fontsize="small")
    panels[1][2].margins(x=0.12)
    return figure


def _held_out(axes: Any, table: Table, rows: Sequence[Row]) -> None:
    if not table.labels:
        _bars(
            axes,
            rows,
            lambda row: row.loss or 0,
            "held-out loss (nats a token)",
            error=lambda row: row.loss_error or 0,
        )
        return
    _bars(
        axes,
        rows,
        lambda row: 100 * (row.accuracy or 0),
        "held-out accuracy (%); dotted: one answer always",
        error=lambda row: 100 * (row.accuracy_error or 0),
    )
    axes.axvline(100 * (table.majority or 0), color="0.3", linewidth=1, linestyle=":")


def _bars(
    axes: Any,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    label: str,
    *,
    error: Callable[[Row], float] | None = None,
) -> Any:
    places = range(len(rows))
    colors = [BASE if row.is_base else BAR for row in rows]
    spread = None if error is None else [error(row) for row in rows]
    values = [value(row) for row in rows]
    bars = axes.barh(places, values, xerr=spread, color=colors, ecolor="0.2", capsize=3, height=0.65)
    _name(axes, rows, label)
    return bars


def _forgetting(axes: Any, rows: Sequence[Row]) -> None:
    """How many times the perplexity on the other text is what it was, from 1 on."""
    ratios = [exp(row.other_change or 0) for row in rows]
    errors = [ratio * (row.other_change_error or 0) for ratio, row in zip(ratios, rows, strict=True)]
    colors = [BASE if row.is_base else BAR for row in rows]
    widths = [ratio - 1 for ratio in ratios]
    axes.barh(range(len(rows)), widths, left=1, xerr=errors, color=colors, ecolor="0.2", capsize=3, height=0.65)
    _name(axes, rows, "other text: perplexity after / before")
    axes.axvline(1, color="0.3", linewidth=1)
    if ratios and max(ratios) > 3:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)


def _sizes(axes: Any, rows: Sequence[Row]) -> None:
    """Trained parameters on a logarithmic axis, and beside them what they take on disk."""
    bars = _bars(axes, rows, lambda row: row.trainable or 0, "trained parameters, and the adapter on disk")
    axes.bar_label(bars, [size(row.adapter_bytes or 0) for row in rows], padding=3, fontsize="small")
    if rows:
        values = [row.trainable or 1 for row in rows]
        axes.set_xscale("log")
        # A bar on such an axis has no beginning; a decade below the smallest is one.
        axes.set_xlim(min(values) / 10, max(values) * 30)
        _plain_ticks(axes.xaxis)


def _steps(axes: Any, rows: Sequence[Row]) -> None:
    """Median seconds a step, with the range of most steps."""
    middle = [row.step_median or 0 for row in rows]
    low = [m - (row.step_low or 0) for m, row in zip(middle, rows, strict=True)]
    high = [(row.step_high or 0) - m for m, row in zip(middle, rows, strict=True)]
    axes.barh(range(len(rows)), middle, xerr=[low, high], color=BAR, ecolor="0.2", capsize=3, height=0.65)
    _name(axes, rows, "seconds a step (median, 10 % to 90 %)")


def _name(axes: Any, rows: Sequence[Row], label: str) -> None:
    axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Any, rows: Sequence[Row]) -> None:
    """Training loss, step by step, as a running mean."""
    for row in rows:
        losses = running_mean(running_mean(row.train_loss))
        axes.plot(range(1, len(losses) + 1), losses, label=_short(row.name), linewidth=1.5)
    axes.set(xlabel="optimizer step", ylabel="training loss (running mean)")
    values = [loss for row in rows for loss in row.train_loss]
    if values and min(values) > 0:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(frameon=False, fontsize="small")


def _plain_ticks(axis: Any) -> None:
    """Numbers in the place of powers of ten: a thousand is 1k."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    units = (("M", 1e6), ("k", 1e3), ("", 1.0))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis.axis_name == "y" else (1,)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: next(f"{value / by:g}{unit}" for unit, by in units if value >= by or not unit))
    )


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222;
  background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.base { color: #666 } tr.failed td { color: #a00; text-align: left; white-space: normal }
.wide { overflow-x: auto } svg { width: 100%; height: auto; margin: 1rem 0 } p { margin: .2rem 0 }
"""


def page(table: Table, picture: str) -> str:
    """The HTML page.

    Args:
        picture: an SVG element.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header(table))
    body = "\n".join(_line(row, table) for row in table.rows)
    notes = "\n".join(f"<p>{html.escape(note)}</p>" for note in (*table.notes, *table.failures))
    title = html.escape(table.title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
{picture}
{notes}
</body>
</html>
"""


def _line(row: Row, table: Table) -> str:
    if row.loss is None:
        name, reason, rest = html.escape(row.name), html.escape(str(row.reason)), len(header(table)) - 1
        return f'<tr class="failed"><td>{name}</td><td colspan="{rest}">failed: {reason}</td></tr>'
    line = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row, table))
    return f'<tr class="base">{line}</tr>' if row.is_base else f"<tr>{line}</tr>"

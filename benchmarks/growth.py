"""Growth of costs: the slope of log(time) over log(number) in each family of cases, said and drawn.

1 is linear, 0 does not grow, and what is quadratic in a part tends to 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import OURS, Row
from benchmarks.output import duration
from minipeft.files import atomic_path

# The candidate that is a part of ours, in a family whose growth it explains.
PART = "torch's attention"
COLUMNS = 3

Points = list[tuple[float, float]]


def families(rows: Sequence[Row]) -> dict[str, Points]:
    """(number, our median in microseconds) of each variant, and without `PART` where that was measured beside it."""
    found: dict[str, Points] = {}
    for row in rows:
        if not row.median:
            continue
        number = float(row.shape)
        if row.candidate == OURS:
            found.setdefault(row.variant, []).append((number, row.median))
        elif row.candidate == PART and dict(found.get(row.variant, ())).get(number, 0.0) > row.median:
            whole = dict(found[row.variant])[number]
            found.setdefault(f"{row.variant} less {PART}", []).append((number, whole - row.median))
    return {name: points for name, points in found.items() if len(points) > 1}


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """The slope of each family: by least squares, and of its last two points."""
    return {
        f"slope of {name}": f"{slope(points):.2f} from {points[0][0]:g} to {points[-1][0]:g}, "
        f"{slope(points[-2:]):.2f} at the end"
        for name, points in families(rows).items()
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through (log x, log y)."""
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw each family on logarithmic axes, beside a line that grows linearly from its first point; as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # The object interface with its own canvas: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = families(rows)
    lines = max(1, math.ceil(len(found) / COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 0.5 + 2.8 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for axes, (name, points) in zip(panels, found.items(), strict=False):
        (first, start), numbers = points[0], [x for x, _ in points]
        axes.plot(numbers, [y / 1e3 for _, y in points], "o-", label=OURS)
        axes.plot(numbers, [start / 1e3 * x / first for x in numbers], "--", color="grey", label="linear")
        for x, y in points:
            axes.annotate(duration(y), (x, y / 1e3), (0, -12), textcoords="offset points", fontsize=6)
        axes.set(xscale="log", yscale="log", ylabel="milliseconds")
        axes.set_xticks(numbers, [f"{x:g}" for x in numbers], fontsize=8)
        axes.margins(0.15)
        axes.minorticks_off()
        axes.set_title(f"{name}: slope {slope(points):.2f}", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    if found:
        panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")

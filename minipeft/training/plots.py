"""The loss curve as a picture. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minipeft.files import atomic_path
from minipeft.training.errors import MissingExtraError


def check_matplotlib() -> None:
    """Raise MissingExtraError now rather than at the end of the run."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = "drawing a loss curve needs matplotlib: pip install 'minipeft[demo]'"
        raise MissingExtraError(message) from None


def plot_loss_curve(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "loss") -> Path:
    """Draw training and evaluation loss over steps as a PNG.

    Args:
        rows: rows of the run's log, see `metrics.read_log`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_matplotlib()
    # The object interface with its own canvas: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return Path(path)

"""The loss curve as a picture. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minipeft.files import atomic_path
from minipeft.train.errors import MissingExtraError

# Above this many rows the training loss is drawn as a running mean, over so many neighbours on either side.
FEW_ROWS, REACH = 20, 2


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
    steps, losses = _series(rows, "loss")
    if len(losses) > FEW_ROWS:
        # One step's loss is mostly the luck of its batch: it stays visible behind its running mean.
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(losses), color="tab:blue", label="training (running mean)")
    elif losses:
        axes.plot(steps, losses, color="tab:blue", label="training")
    held_out_steps, held_out = _series(rows, "eval_loss")
    if held_out:
        axes.plot(held_out_steps, held_out, "o-", color="tab:orange", markersize=5, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    _scale(axes, [*losses, *held_out])
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return Path(path)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def running_mean(values: Sequence[float]) -> list[float]:
    """Every value averaged with up to `REACH` neighbours on either side."""
    windows = [values[max(0, i - REACH) : i + REACH + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic, with plain numbers, where the loss falls far: a linear axis would show an L."""
    if not values or min(values) <= 0 or max(values) < 10 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

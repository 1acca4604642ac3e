"""The picture of `minipeft kernels --profile`: what each resource of a GPU needs, and what is executed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipeft.files import atomic_path

if TYPE_CHECKING:
    from minipeft_kernels.emulator.counts import Counts
    from minipeft_kernels.lab.bounds import Bound
    from minipeft_kernels.lab.profile import Profile


def plot_profile(found: Profile, path: Path) -> None:
    """Write a PNG: for each launch its bounds by resource on each GPU, and its instructions by class.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib, or leave --plot out") from error
    count = len(found.launches)
    figure = Figure(figsize=(12, 4 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 2, squeeze=False)
    shape = " x ".join(map(str, found.shape))
    figure.suptitle(f"{found.operation} {shape} {found.dtype}, {found.target}: bounds, not times")
    for i, launch in enumerate(found.launches):
        assert launch.counts is not None
        _plot_bounds(axes[i][0], launch.name, {name: lists[i] for name, lists in found.bounds.items()})
        _plot_classes(axes[i][1], launch.counts, found.case.elements)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _plot_bounds(axis: Any, title: str, by_gpu: dict[str, list[Bound]]) -> None:
    resources = [b.resource for b in next(iter(by_gpu.values()))][::-1]
    height = 0.8 / len(by_gpu)
    for i, (name, found) in enumerate(by_gpu.items()):
        times = {b.resource: b.microseconds for b in found}
        places = [j + i * height for j in range(len(resources))]
        axis.barh(places, [times[r] for r in resources], height=height, label=name)
    axis.set_yticks([j + 0.4 - height / 2 for j in range(len(resources))], resources)
    axis.set_xlabel("microseconds that it needs at least, if nothing waits")
    axis.set_title(title)
    axis.legend()


def _plot_classes(axis: Any, counts: Counts, elements: int) -> None:
    from minipeft_kernels.emulator.classes import CLASSES
    from minipeft_kernels.emulator.traffic import LANES

    names = [name for name in CLASSES if counts.instructions[name]][::-1]
    axis.barh(names, [LANES * counts.instructions[name] / elements for name in names], color="tab:gray")
    axis.set_xlabel("PTX instructions a thread and element")
    axis.set_title("moves are renamed away by the assembler")

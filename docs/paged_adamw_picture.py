"""Draws docs/paged_adamw.png: which page of the state is where during three steps, from `memory_stats()["trace"]`.

    python docs/paged_adamw_picture.py [--spill-dir DIR]

The device is simulated: memory of its own, to which copies take the time that PCIe takes. The disk is real.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minipeft import PagedAdamW
from minipeft.optim.tiers import SimulatedDevice

PAGE, PAGES, DEVICE, HOST, STEPS = 4 << 20, 24, 8, 8, 3
BYTES_PER_SECOND = 12e9
COLORS = {"device": "#1b4f8a", "host": "#8fb8de", "disk": "#ececec"}


def record(spill_dir: str) -> list[list[tuple[float, str, int, str]]]:
    """The traces of some steps in a steady state."""
    p = torch.nn.Parameter(torch.zeros(PAGE * PAGES // 8))
    p.grad = torch.ones_like(p)
    optimizer = PagedAdamW(
        [p],
        page_bytes=PAGE,
        device_budget=DEVICE * PAGE,
        host_budget=HOST * PAGE,
        spill_dir=spill_dir,
        simulate=lambda *args: SimulatedDevice(*args, bytes_per_second=BYTES_PER_SECOND),
    )
    for _ in range(4):
        optimizer.step()
    traces = []
    for _ in range(STEPS):
        optimizer.trace_pages()
        optimizer.step()
        traces.append(optimizer.memory_stats()["trace"])
    optimizer.close()
    return traces


def draw(traces: list[list[tuple[float, str, int, str]]], path: Path) -> None:
    """One panel a step: pages upwards, time to the right, the colour where a page is, a dot where it is used."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(traces), sharey=True)
    for number, (axes, trace) in enumerate(zip(panels, traces, strict=True), start=1):
        _panel(axes, trace)
        axes.set(title=f"step {number}", xlabel="milliseconds")
    panels[0].set(ylabel="page of the state", ylim=(-0.5, PAGES - 0.5))
    handles = [panels[0].barh([-9], [0], color=color, label=name) for name, color in COLORS.items()]
    handles += panels[0].plot([], [], "o", color="#d9541a", markersize=4, label="updated")
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, trace: list[tuple[float, str, int, str]]) -> None:
    begin = trace[0][0]
    end = max(seconds for seconds, event, _, _ in trace if event == "used")
    where: dict[int, tuple[float, str]] = {}
    for seconds, event, page, tier in [*trace, *((end, "end", page, "") for page in range(PAGES))]:
        now = 1e3 * (min(seconds, end) - begin)
        if event == "used":
            axes.plot(now, page, "o", color="#d9541a", markersize=3)
            continue
        if page in where:
            since, old = where[page]
            axes.barh(page, now - since, left=since, height=0.86, color=COLORS[old])
        where[page] = (now, tier)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spill-dir", default=tempfile.gettempdir())
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix("").parent / "paged_adamw.png")
    arguments = parser.parse_args()
    draw(record(arguments.spill_dir), arguments.output)

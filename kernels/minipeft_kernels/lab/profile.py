"""`minipeft kernels --profile OPERATION --shape M,N,K`: what an operation's launches do, and what bounds them.

A grid has thousands of blocks that do the same on other data. So some tiles are run, spread evenly over the grid, and
their counts scaled up; blocks that share a tile are run together, because the last of them does more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..emulator import EmulatedLaunch, emulate
from ..emulator.classes import CLASSES
from ..emulator.counts import Counts
from ..emulator.traffic import LANES, SECTOR
from . import emulation  # noqa: F401, lets the operations run in the emulator
from .bounds import Bound, bounds, gpus_of
from .cases import Case, case

# Tiles that are run: 4 took 2 to 12 s for the shipped products on 4096 x 4096, two cores.
TILES = 4
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOP_LINES = 12


@dataclass(frozen=True)
class Profile:
    """Of one operation on one shape.

    Attributes:
        operation, shape, dtype, target: what was asked. case: what it amounts to. launches: with their counts.
        bounds: for each GPU of the target, one list a launch.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    target: str
    case: Case
    launches: list[EmulatedLaunch]
    bounds: dict[str, list[list[Bound]]]


def profile(operation: str, shape: Sequence[int], target: str = "sm_80", dtype: str = "bf16") -> Profile:
    """Run a part of an operation's blocks in the emulator, and count.

    Args:
        operation: one of `cases.OPERATIONS`. shape: as it says there. target: "sm_80" or "sm_90".
        dtype: of activations, weights or parameters: "bf16", "fp16" or "fp32".

    Raises:
        ValueError: no such operation, or a shape that does not fit it. RuntimeError: as `emulate`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    with emulate(target, checks=False, blocks=some_tiles) as run, torch.no_grad():
        made = case(operation, tuple(shape), DTYPES[dtype])
        made.run()
        capability = run.capability
    found = {gpu.name: [bounds(counts_of(launch), gpu) for launch in run.launches] for gpu in gpus_of(capability)}
    return Profile(operation, tuple(shape), dtype, target, made, run.launches, found)


def some_tiles(grid: tuple[int, int, int]) -> list[int]:
    """Blocks to run: all that share one of TILES places along x, spread evenly from the first to the last."""
    x, y, z = grid
    count = min(x, TILES)
    places = sorted({round(i * (x - 1) / max(1, count - 1)) for i in range(count)})
    return [place + x * i for i in range(y * z) for place in places]


def counts_of(launch: EmulatedLaunch) -> Counts:
    """The counts of a launch, of which there must be some."""
    assert launch.counts is not None
    return launch.counts


def report(found: Profile) -> str:
    """A profile as text."""
    shape = " x ".join(f"{n:,}" for n in found.shape)
    lines = [f"{found.operation} {shape} {found.dtype} on {found.target}, emulated. Bounds, not times: nothing waits."]
    if found.case.note:
        lines.append(f"Note: {found.case.note}.")
    for i, launch in enumerate(found.launches):
        lines += ["", *_launch_lines(launch, found.case)]
        lines += _bound_lines([(name, lists[i]) for name, lists in found.bounds.items()])
    return "\n".join(lines) + "\n"


def _launch_lines(launch: EmulatedLaunch, made: Case) -> Iterator[str]:
    counts = counts_of(launch)
    yield f"{launch.name}: {counts.blocks:,} blocks of {counts.warps} warps, {launch.shared:,} bytes of shared memory"
    if counts.executed < counts.blocks:
        yield f"  {counts.executed:,} of the blocks were run, and every number scaled up to all of them"
    issued = max(1.0, counts.issued)
    # One instruction of a warp is 32 instructions of threads.
    per_element = LANES * issued / made.elements
    yield f"  {issued:,.0f} warp instructions, moves apart: {per_element:.2f} a thread and element, of"
    parts = [(name, counts.instructions[name]) for name in CLASSES if counts.instructions[name]]
    yield "    " + ", ".join(f"{name} {LANES * n / made.elements:.2f}" for name, n in parts)
    if counts.tensor_flops:
        yield (
            f"  tensor cores: {counts.tensor_flops / 1e9:.3f} GFLOP, {counts.tensor_flops / made.flops:.2f} times what "
            f"the product has; {issued / counts.tensor_flops * 1e3:.2f} warp instructions for 1000 of them"
        )
    for name, access in (("global loads", counts.global_load), ("global stores", counts.global_store)):
        if access.requests:
            yield (
                f"  {name}: {access.transactions:,.0f} sectors of {SECTOR} bytes where {access.least:,.0f} would do "
                f"({access.efficiency:.0%} coalesced)"
            )
    for name, access in (("shared loads", counts.shared_load), ("shared stores", counts.shared_store)):
        if access.requests:
            yield (
                f"  {name}: {access.transactions:,.0f} wavefronts where {access.least:,.0f} would do "
                f"({access.transactions / max(1.0, access.least) - 1:.0%} bank conflicts)"
            )
    yield f"  bytes: {counts.unique_bytes:,.0f} touched; the operation has {made.least_bytes:,} to read and write"
    for name, tensor in sorted(counts.tensors.items(), key=lambda item: -item[1].unique_read - item[1].unique_written):
        moved = tensor.sector_bytes_read + tensor.sector_bytes_written
        touched = tensor.unique_read + tensor.unique_written
        yield f"    {name:32} {touched:14,.0f} touched {moved:16,.0f} moved to the multiprocessors"
    yield "  instructions by line:"
    for (file, number), count in sorted(counts.lines.items(), key=lambda item: -item[1])[:TOP_LINES]:
        yield f"    {file}:{number:<6} {count / sum(counts.lines.values()):5.1%}"


def _bound_lines(by_gpu: list[tuple[str, list[Bound]]]) -> Iterator[str]:
    for name, found in by_gpu:
        yield f"  bound on {name}: {found[0].microseconds:.2f} microseconds, by {found[0].resource}"
        for bound in found:
            if bound.microseconds > 0.0:
                yield f"    {bound.resource:14} {bound.microseconds:10.2f}   {bound.work}"

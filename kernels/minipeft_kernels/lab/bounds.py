"""A bound on how fast a launch can be: the time that each part of a GPU needs for what was counted, if nothing waits.

This is a bound, not a time. No latency is in it, no barrier, no dependence of one instruction on another; a launch
cannot be faster than the largest of its parts, and is slower by what it waits.

Figures are of `roofline`: clock, multiprocessors, memory and tensor cores by their maker's data sheet.
For one multiprocessor and clock (CUDA C++ Programming Guide, "Arithmetic Instructions", throughput of native
instructions; the tuning guides of each architecture):

    issue        4 warp instructions, one a scheduler; moves are not issued, the assembler renames them
    integer      2 warp instructions: 64 lanes
    multiply-add 4 warp instructions: 128 lanes (2 on capability 8.0: 64 lanes)
    convert      2 warp instructions: 64 lanes (some conversions are slower)
    special      1/2 warp instruction: 16 lanes, for roots, quotients and exponentials (a quotient takes more than one)
    shared       1 wavefront: 32 banks of 4 bytes
    requests     1 access to memory, global or shared, by a warp
    L1           4 sectors, 128 bytes, of global memory

and for the whole GPU

    DRAM         its bandwidth, for bytes that are touched, each once
    tensor       its dense rate for 16-bit operands
"""

from __future__ import annotations

from dataclasses import dataclass

from ..emulator.counts import Counts
from .roofline import GPU, GPUS, INTEGER_ISSUE, ISSUE

SHARED_WAVEFRONTS = 1
REQUESTS = 1
L1_SECTORS = 4
CONVERT_ISSUE = 2
SPECIAL_ISSUE = 0.5
# float32 lanes of a multiprocessor: 64 on the first Ampere, 128 on all that followed.
MULTIPLY_ADD_ISSUE = {80: 2}
DEFAULT_MULTIPLY_ADD_ISSUE = 4


@dataclass(frozen=True)
class Bound:
    """Microseconds that one resource needs, and the work that it was worked out from, in words."""

    resource: str
    microseconds: float
    work: str


def bounds(counts: Counts, gpu: GPU) -> list[Bound]:
    """The time that each resource of a GPU needs for a launch, the largest first.

    Blocks are spread over as many multiprocessors as there are blocks to give; only those work.

    Args:
        counts: of a launch. gpu: of `roofline.GPUS`.
    """
    busy = min(counts.blocks, gpu.multiprocessors)
    if not busy:
        return []
    # Whole blocks: the multiprocessor with most of them decides.
    share = -(-counts.blocks // busy) / counts.blocks
    classes = counts.instructions
    shared = counts.shared_load.transactions + counts.shared_store.transactions
    sectors = counts.global_load.transactions + counts.global_store.transactions + counts.global_atomic.transactions
    accesses = (counts.global_load, counts.global_store, counts.global_atomic, counts.shared_load, counts.shared_store)
    requests = sum(a.requests for a in accesses)
    multiply_add = MULTIPLY_ADD_ISSUE.get(gpu.capability, DEFAULT_MULTIPLY_ADD_ISSUE)

    def clocks(name: str, amount: float, rate: float, what: str) -> Bound:
        return Bound(name, amount * share / rate / gpu.clock / 1e3, f"{amount:,.0f} {what}")

    found = [
        clocks("issue", counts.issued, ISSUE, "warp instructions"),
        clocks("integer", classes["integer"], INTEGER_ISSUE, "warp instructions"),
        clocks("multiply-add", classes["multiply-add"], multiply_add, "warp instructions"),
        clocks("convert", classes["convert"], CONVERT_ISSUE, "warp instructions"),
        clocks("special", classes["special"], SPECIAL_ISSUE, "warp instructions"),
        clocks("shared", shared, SHARED_WAVEFRONTS, "wavefronts"),
        clocks("requests", requests, REQUESTS, "accesses of warps"),
        clocks("L1", sectors, L1_SECTORS, "sectors"),
        Bound("DRAM", counts.unique_bytes / gpu.bandwidth / 1e3, f"{counts.unique_bytes / 1e6:,.2f} MB"),
        Bound("tensor", counts.tensor_flops / gpu.tflops / 1e6, f"{counts.tensor_flops / 1e9:,.3f} GFLOP"),
    ]
    return sorted(found, key=lambda b: -b.microseconds)


def gpus_of(capability: int) -> list[GPU]:
    """The GPUs of a capability (80 for 8.0) whose data sheets are known."""
    return [g for g in GPUS if g.capability == capability]

"""Compile the shipped kernels for GPUs that are not there, and report their machine code.

`minipeft kernels --target sm_80 [--against bitsandbytes] [--json F]` prints, for each kernel and configuration,
registers, spills, shared memory, resident warps, the tensor-core instruction, and the inner loop's instructions a
weight; then what the products of Llama models cost at least on GPUs of that kind. Nothing is run: these are counts,
and floors by data sheets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .. import native
from ..dispatch import interpreting
from ..emulator.lanes import WARP
from ..emulator.targets import capability_of
from ..linear.gpu import grid_of
from ..linear.tiles import CHUNK, split_for, tile_for
from .catalogue import Kernel, shipped
from .roofline import GPUS, LLAMA_SHAPES, Floor, budget, floor, resident_warps
from .sass import MMA, Loop, read_cubin

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100")
FLOOR_ROWS = (1, 8, 16, 32, 64)


@dataclass(frozen=True)
class Report:
    """The findings in the machine code of one kernel.

    Counts are of one thread, and of one turn of the inner loop, or of the whole kernel if it has none
    (loop_instructions 0); an element is a weight, or a parameter or number for kernels that have no weight.
    """

    name: str
    target: str
    rows: int
    grad: bool
    registers: int
    spilled_bytes: int
    shared_bytes: int
    resident_warps: int
    instructions: int
    loop_instructions: int
    classes: dict[str, int]
    tensor_instructions: dict[str, int]
    elements: float
    per_element: float
    integer_per_element: float
    permutes_per_element: float


def compile_kernel(kernel: Kernel, target: str) -> Any:
    """Triton's compilation of a kernel for a target such as "sm_90", pointers and sizes taken as multiples of 16.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which functions cannot be compiled.
    """
    if interpreting():
        raise RuntimeError(
            "kernels are interpreted, not compiled, under TRITON_INTERPRET: unset it to read machine code"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    unspecialized = {p.name for p in kernel.function.params if p.do_not_specialize}
    for i, argument in enumerate(kernel.function.arg_names):
        signature[argument] = "constexpr" if argument in kernel.constants else kernel.types[argument]
        if argument not in kernel.constants and argument not in unspecialized:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature, kernel.constants, attrs=aligned)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, **kernel.options}
    return triton.compile(source, target=GPUTarget("cuda", capability_of(target), WARP), options=options)


def inspect(kernel: Kernel, target: str) -> Report:
    """Compile a kernel for a target and read its machine code."""
    compiled = compile_kernel(kernel, target)
    function, registers, stack = read_cubin(compiled.asm["cubin"])
    # Permutes mark the loop over the weights: that over the ranks of an update has tensor-core instructions too.
    work = (("PRMT",) if kernel.tensor_cores else ("FFMA",)) if kernel.rows else MMA
    loop = function.inner_loop(work) if kernel.rows or kernel.tensor_cores else None
    counted = loop or Loop(function.instructions)
    names, classes = counted.names(), counted.classes()
    shared = compiled.metadata.shared
    return Report(
        name=kernel.name,
        target=target,
        rows=kernel.rows,
        grad=kernel.grad,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=shared,
        resident_warps=resident_warps(capability_of(target), registers, shared, kernel.warps),
        instructions=len(function.instructions),
        loop_instructions=len(loop.instructions) if loop else 0,
        classes=dict(classes.most_common()),
        tensor_instructions={n: c for n, c in names.items() if n in MMA},
        elements=kernel.elements,
        per_element=len(counted.instructions) / kernel.elements,
        integer_per_element=classes["integer"] / kernel.elements,
        permutes_per_element=names["PRMT"] / kernel.elements,
    )


def floors(reports: Iterable[Report], target: str) -> list[Floor]:
    """The least times of Llama's products on the GPUs of a target, both ways, with the reported code."""
    products = {(r.grad, r.rows): r for r in reports if r.rows}
    capability = capability_of(target)
    gpus = [g for g in GPUS if g.capability == capability]
    found = []
    for gpu, shape, grad, m in product(gpus, LLAMA_SHAPES, (False, True), FLOOR_ROWS):
        _, n, k = shape
        tile = tile_for(m, grad, capability, wide=False)
        report = products[grad, tile.rows]
        tiles, steps = grid_of(tile, -(-m // tile.rows), n, k // CHUNK, grad)
        split = split_for(tiles, steps, m, n if grad else k, tile, gpu.multiprocessors)
        counts = (report.per_element, report.integer_per_element)
        found.append(floor(gpu, shape, m, *counts, tiles=-(-m // tile.rows), split=split, grad=grad))
    return found


def table(reports: Iterable[Report]) -> str:
    """The reports as text, one line each."""
    head = f"{'kernel':38} {'regs':>4} {'spill':>5} {'shared':>7} {'warps':>5} {'loop':>5} {'tensor':>9} "
    head += f"{'/element':>8} {'integer':>8} {'permute':>8}"
    lines = [head]
    for r in reports:
        tensor = ", ".join(f"{count} {name}" for name, count in r.tensor_instructions.items()) or "none"
        lines.append(
            f"{r.name:38} {r.registers:4} {r.spilled_bytes:5} {r.shared_bytes:7} {r.resident_warps:5} "
            f"{r.loop_instructions:5} {tensor:>9} {r.per_element:8.2f} {r.integer_per_element:8.2f} "
            f"{r.permutes_per_element:8.2f}"
        )
    return "\n".join(lines)


def floor_table(found: Iterable[Floor]) -> str:
    """Floors as text: microseconds, none of them measured."""
    lines = [
        f"{'GPU':15} {'product':21} {'M':>4} {'MB':>7} {'GFLOP':>7} {'memory':>8} {'tensor':>8} {'issue':>8} "
        f"{'integer':>8} {'dense bf16':>10}"
    ]
    for f in found:
        lines.append(
            f"{f.gpu:15} {f.shape:21} {f.m:4} {f.megabytes:7.1f} {f.gigaflops:7.2f} {f.memory:8.1f} {f.tensor:8.1f} "
            f"{f.issue:8.1f} {f.integer:8.1f} {f.dense_memory:10.1f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> str:
    """Body of `minipeft kernels`: the report as text; with --json it is also written to a file.

    Args:
        arguments: of the command line: --target, --against bitsandbytes, --json FILE, --dtype.
    """
    options = _parser().parse_args(arguments)
    import triton

    capability = capability_of(options.target)
    reports = [inspect(kernel, options.target) for kernel in shipped(capability, options.dtype)]
    found = floors(reports, options.target) if options.dtype == "bf16" else []
    parts = [
        f"Machine code for {options.target}, compiled here by Triton {triton.__version__}; nothing was run. Doubly "
        "quantized weights, blocksize 64.\n"
        f"On this machine's CPU: {native.describe()}.",
        table(reports),
    ]
    result: dict[str, Any] = {"target": options.target, "triton": triton.__version__}
    result["kernels"] = [asdict(r) for r in reports]
    if options.against:
        from .peers import bitsandbytes_kernels, peer_table

        peers = bitsandbytes_kernels(options.target)
        parts.append("The same counts in the machine code that bitsandbytes ships:\n" + peer_table(peers))
        result["bitsandbytes"] = [asdict(p) for p in peers]
    if found:
        budgets = [f"{budget(g):.1f} on {g.name}" for g in GPUS if g.capability == capability]
        parts.append(
            "Floors of x W^T in microseconds, by data sheet, unmeasured; partial sums count as memory. 'issue' and "
            "'integer': what the counted instructions take if nothing waits. Instructions a weight at the memory's "
            f"limit: {', '.join(budgets)}.\n" + floor_table(f for f in found if not f.grad)
        )
        result["floors"] = [asdict(f) | {"floor": f.floor, "model": f.model} for f in found]
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("minipeft kernels", description="the machine code of the shipped kernels")
    parser.add_argument("--target", default="sm_80", help=f"the GPU's architecture: {', '.join(TARGETS)}")
    parser.add_argument("--against", choices=["bitsandbytes"], help="read the peer's shipped machine code too")
    parser.add_argument("--json", metavar="FILE", help="write everything to a file as well")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of x")
    return parser

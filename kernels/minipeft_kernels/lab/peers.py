"""The machine code that bitsandbytes ships for the same product, counted in the same way.

Its kernels look a level up by a shuffle: each lane of a warp holds one, and a lane asks the lane of its code. So a
loop's shuffles are the weights that a thread decodes in it. The kernels on tensor cores confirm that: a multiplication
of 16 x 8 x 16 takes 64/BM of a thread's weights, BM being the rows of x in a tile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .sass import Function, disassemble, tool

_TENSOR = re.compile(r"gemm_4bit_sm80_m16n8k16I13__nv_bfloat16Li(\d+)ELi(\d+)ELi(\d+)E")
_VECTOR = re.compile(r"gemm_4bit_simtI13__nv_bfloat16Li(\d+)E")
LOOKUP = ("SHFL",)


@dataclass(frozen=True)
class PeerKernel:
    """One of bitsandbytes' bfloat16 kernels: rows of x in a tile, and its inner loop by weight and thread."""

    name: str
    rows: int
    loop_instructions: int
    loop_classes: dict[str, int]
    weights: int
    per_weight: float
    integer_per_weight: float


def bitsandbytes_library() -> Path:
    """The CUDA library of the installed bitsandbytes for the newest CUDA that its wheel has.

    Raises:
        FileNotFoundError: bitsandbytes is not installed, or without CUDA libraries.
    """
    import importlib.util

    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("bitsandbytes is not installed: pip install bitsandbytes (no GPU is needed to read it)")
    libraries = sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so"))
    if not libraries:
        raise FileNotFoundError(f"{Path(spec.origin).parent} has no libbitsandbytes_cuda*.so to read")
    return libraries[-1]


def bitsandbytes_kernels(target: str) -> list[PeerKernel]:
    """Its fused bfloat16 products for a target such as "sm_80", by rows of x.

    Raises:
        FileNotFoundError: as `bitsandbytes_library`. ValueError: the library has no code for the target.
    """
    library = bitsandbytes_library()
    with tempfile.TemporaryDirectory() as folder:
        extract = [tool("cuobjdump"), "-xelf", f"{target}.cubin", str(library.resolve())]
        subprocess.run(extract, cwd=folder, capture_output=True, check=True)
        cubins = list(Path(folder).glob("*.cubin"))
        if not cubins:
            raise ValueError(f"{library.name} has no machine code for {target}")
        functions = [f for cubin in cubins for f in disassemble(cubin)]
    found = [kernel for f in functions if (kernel := _read(f)) is not None]
    return sorted(found, key=lambda k: (k.rows, k.name))


def _read(function: Function) -> PeerKernel | None:
    tensor, vector = _TENSOR.search(function.name), _VECTOR.search(function.name)
    if tensor:
        rows, name = int(tensor[1]), f"tensor cores {tensor[1]}x{tensor[2]}x{tensor[3]}"
    elif vector:
        rows, name = int(vector[1]), f"a warp a column, M = {vector[1]}"
    else:
        return None
    loop = function.inner_loop(LOOKUP)
    if loop is None:
        return None
    weights, count = loop.names()["SHFL"], len(loop.instructions)
    classes = loop.classes()
    return PeerKernel(
        *(name, rows, count, dict(classes.most_common()), weights),
        per_weight=count / weights,
        integer_per_weight=classes["integer"] / weights,
    )


def peer_table(kernels: Iterable[PeerKernel]) -> str:
    """The peer's kernels as text, one line each."""
    lines = [f"{'kernel':38} {'rows':>4} {'loop':>5} {'weights':>8} {'/weight':>8} {'integer':>8}"]
    for k in kernels:
        lines.append(
            f"{k.name:38} {k.rows:4} {k.loop_instructions:5} {k.weights:8} {k.per_weight:8.2f} "
            f"{k.integer_per_weight:8.2f}"
        )
    return "\n".join(lines)

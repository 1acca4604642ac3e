"""The least time that a product with a packed weight can take on a GPU: bytes, tensor operations, instructions.

Every figure of a GPU is its maker's. The floors are arithmetic on them, not measurements: real kernels stay above.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..emulator.lanes import WARP
from ..emulator.targets import MULTIPROCESSORS

# Warp instructions a multiprocessor issues a clock, and how many of them its integer pipes finish: 64 lanes of 32.
ISSUE = 4
INTEGER_ISSUE = 2


@dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet: clock in GHz (boost), memory in GB/s, dense bfloat16 tensor arithmetic in TFLOP/s."""

    name: str
    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float
    tflops: float


GPUS = (
    GPU("RTX 3090", 86, 82, 1.695, 936, 71),
    GPU("RTX 4090", 89, 128, 2.52, 1008, 165),
    GPU("L40S", 89, 142, 2.52, 864, 362),
    GPU("A100 SXM 80 GB", 80, 108, 1.41, 2039, 312),
    GPU("H100 SXM", 90, 132, 1.755, 3350, 989),
    GPU("H200 SXM", 90, 132, 1.755, 4800, 989),
    GPU("B200", 100, 148, 1.85, 8000, 2250),
)

# (name, out_features, in_features) of the projections of Llama 2 7B and Llama 3 8B.
LLAMA_SHAPES = (
    ("Llama 2 7B q, k, v, o", 4096, 4096),
    ("Llama 2 7B gate, up", 11008, 4096),
    ("Llama 2 7B down", 4096, 11008),
    ("Llama 3 8B k, v", 1024, 4096),
    ("Llama 3 8B gate, up", 14336, 4096),
    ("Llama 3 8B down", 4096, 14336),
)


def resident_warps(capability: int, registers: int, shared: int, warps: int) -> int:
    """Warps of one kernel that a multiprocessor holds at once.

    Args:
        capability: of the GPU, 80 for 8.0. registers: a thread. shared: bytes a block. warps: a block.
    """
    limits = MULTIPROCESSORS[capability]
    # Registers are given out in units of 256 a warp, a quarter of them to each of four schedulers; shared memory in
    # units of 128 bytes.
    by_registers = limits.registers // ISSUE // (-(-registers * WARP // 256) * 256) * ISSUE // warps
    by_shared = limits.shared // (-(-(shared + 1024) // 128) * 128)
    return warps * min(by_registers, by_shared, limits.warps // warps, limits.blocks)


def weight_bytes(n: int, k: int, blocksize: int = 64, double: bool = True) -> float:
    """Bytes of a packed weight: half a byte a code, and a byte (or a float32) a block with 4/256 above it."""
    blocks = n * k / blocksize
    return n * k / 2 + (blocks * (1 + 4 / 256) if double else 4 * blocks)


def product_bytes(m: int, n: int, k: int, item: int = 2, tiles: int = 1, split: int = 1) -> float:
    """Bytes that x W^T moves: the weight once for each of `tiles` tiles of rows, x, y, and partial sums both ways."""
    partial = 2 * 4 * split * m * n if split > 1 else 0
    return tiles * weight_bytes(n, k) + item * m * (n + k) + partial


@dataclass(frozen=True)
class Floor:
    """Microseconds that a product takes at least by each of a GPU's limits."""

    gpu: str
    shape: str
    grad: bool
    m: int
    n: int
    k: int
    megabytes: float
    gigaflops: float
    memory: float
    tensor: float
    issue: float
    integer: float
    dense_memory: float

    @property
    def floor(self) -> float:
        """The largest of what the memory and the tensor cores need, whatever the code."""
        return max(self.memory, self.tensor)

    @property
    def model(self) -> float:
        """The largest of all four, with this code."""
        return max(self.floor, self.issue, self.integer)


def floor(
    gpu: GPU,
    shape: tuple[str, int, int],
    m: int,
    per_weight: float,
    integer: float,
    tiles: int = 1,
    split: int = 1,
    grad: bool = False,
) -> Floor:
    """Floors of x W^T with m rows of x, or with `grad` of dy W.

    Args:
        per_weight: instructions a weight and thread in the inner loop. integer: of them on the integer pipe.
        tiles: times that each weight is decoded. split: programs that share a tile.
    """
    name, n, k = shape
    # Partial sums are of the output, n wide forward and k wide backward: the bytes of both trade places.
    moved = product_bytes(m, k, n, split=split) if grad else product_bytes(m, n, k, split=split)
    cycles = n * k * tiles / (WARP * gpu.multiprocessors * gpu.clock * 1e3)
    return Floor(
        *(gpu.name, name, grad, m, n, k),
        megabytes=moved / 1e6,
        gigaflops=2 * m * n * k / 1e9,
        memory=moved / gpu.bandwidth / 1e3,
        tensor=2 * m * n * k / gpu.tflops / 1e6,
        issue=cycles * per_weight / ISSUE,
        integer=cycles * integer / INTEGER_ISSUE,
        dense_memory=(2 * n * k + 2 * m * (n + k)) / gpu.bandwidth / 1e3,
    )


def budget(gpu: GPU) -> float:
    """Instructions a weight at which issuing them takes as long as reading the packed weight."""
    weights_a_clock = gpu.bandwidth / gpu.clock / gpu.multiprocessors / weight_bytes(1, 1)
    return ISSUE * WARP / weights_a_clock

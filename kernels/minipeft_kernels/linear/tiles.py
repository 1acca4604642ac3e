"""The tile that a product with a packed weight runs in, the programs that share one, and where fusing stops paying.

**Hopper's were timed**, on an H200 with Triton 3.6, in bfloat16, for weights of 4096 x 4096, 14336 x 4096 and 4096 x
14336 (`python -m benchmarks.first_contact main --only sweep`; its times are in benchmarks/results/first_contact). The
others were chosen by their machine code (`offline.py`: instructions a weight, registers, no spills) and by the model in
kernels/README.md, and wait to be measured; this file is the one place to change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tables import Table

CHUNK = 64
"""Weights of a row that a tile takes at once: the smallest blocksize that the kernels read."""

SPLITS = (1, 2, 4, 8, 16)
"""How many programs may share a tile: few values, since each compiles a kernel of its own."""

SMALLEST_ROWS = 8
"""Rows of the smallest tile: Triton multiplies no fewer."""


@dataclass(frozen=True)
class Tile:
    """One shipped configuration of a kernel.

    Attributes:
        kernel: "direct" (decoded in the tensor core's registers) or "staged" (through shared memory).
        rows: rows of x in a tile (BM). bn: rows of W.
        nb: chunks of 64 weights a step, for "direct".
        warps, stages: of the program; stages of asynchronous copies.
        fill: warps that a multiprocessor should have: a tile is shared until there are so many.
    """

    kernel: str
    rows: int
    bn: int
    nb: int
    warps: int
    stages: int
    fill: int = 8


# Two stages, not three: a third halves the warps that a multiprocessor holds, for the same bytes in flight.
# Two warps, not four: with four, Hopper's and Blackwell's own matrix instructions are taken, which want the packed
# bytes in single-byte loads. Counted on sm_90, 16 rows: 5.5 instructions a weight against 4.1.
_DIRECT = (
    Tile("direct", rows=8, bn=64, nb=4, warps=2, stages=2),
    Tile("direct", rows=16, bn=64, nb=4, warps=2, stages=2),
    Tile("direct", rows=32, bn=64, nb=2, warps=2, stages=2),
)
_STAGED_SMALL = (
    Tile("staged", rows=8, bn=64, nb=1, warps=2, stages=3),
    Tile("staged", rows=16, bn=64, nb=1, warps=2, stages=3),
)
_STAGED_32 = Tile("staged", rows=32, bn=128, nb=1, warps=4, stages=3)
_STAGED_64 = Tile("staged", rows=64, bn=128, nb=1, warps=4, stages=3)
# Blackwell's tensor memory costs more than it saves at these sizes: two warps again.
_BLACKWELL_32 = Tile("staged", rows=32, bn=64, nb=1, warps=2, stages=3)
_BLACKWELL_64 = Tile("staged", rows=64, bn=64, nb=1, warps=2, stages=2)
# With 64 rows of W its registers spill.
_BLACKWELL_GRAD_64 = Tile("staged", rows=64, bn=32, nb=1, warps=2, stages=2)

FORWARD = (*_DIRECT, _STAGED_64)
INPUT_GRAD = (*_STAGED_SMALL, _STAGED_32, _STAGED_64)
BLACKWELL_FORWARD = (*_DIRECT, _BLACKWELL_64)
BLACKWELL_INPUT_GRAD = (*_STAGED_SMALL, _BLACKWELL_32, _BLACKWELL_GRAD_64)

# Measured. Up to 32 rows small programs of one or two warps, forward; for the gradient, and from 33 rows to 128, four
# warps on 64 rows of W, where 128 rows hold twice the registers: 17 against 22 microseconds for 64 rows, 4096 x 4096.
HOPPER_FORWARD = (
    Tile("direct", rows=8, bn=32, nb=2, warps=1, stages=3, fill=6),
    Tile("direct", rows=16, bn=32, nb=2, warps=1, stages=3, fill=6),
    Tile("direct", rows=32, bn=64, nb=2, warps=2, stages=2, fill=6),
    Tile("staged", rows=64, bn=64, nb=1, warps=4, stages=3, fill=12),
    Tile("staged", rows=128, bn=64, nb=1, warps=4, stages=3, fill=7),
)
HOPPER_INPUT_GRAD = (
    Tile("staged", rows=8, bn=64, nb=1, warps=2, stages=3, fill=12),
    Tile("staged", rows=16, bn=64, nb=1, warps=4, stages=3, fill=12),
    Tile("staged", rows=32, bn=64, nb=1, warps=4, stages=3, fill=12),
    Tile("staged", rows=64, bn=64, nb=1, warps=4, stages=3, fill=12),
    Tile("staged", rows=128, bn=64, nb=1, warps=4, stages=3, fill=7),
)

# float32 has no 16-bit levels to permute: the table is read by pointer and the product is on the ordinary cores.
FLOAT32_FORWARD = (Tile("direct", rows=16, bn=32, nb=1, warps=4, stages=2),)
FLOAT32_INPUT_GRAD = (Tile("staged", rows=16, bn=32, nb=1, warps=4, stages=2),)

# On other GPUs than NVIDIA's (and in no other case) the portable decode's levels lie in shared memory: with four chunks
# a step they take 70 of the 64 KB of an MI300, with two 35 to 41 (compiled for gfx942).
PORTABLE_CHUNKS = 2
PORTABLE_ROWS = 16
"""The fewest rows that Triton multiplies wherever it may run."""

EIGHT_ROWS = (3, 5)
"""The first Triton that multiplies eight rows on NVIDIA's GPUs."""

# From the model, on Hopper (9.0) measured: rows up to which one fused kernel beats a dequantization and the vendor's
# product.
# Above, the weight is decoded once into a buffer that is used again. None: at every size, since consumer cards have
# little bandwidth for their arithmetic, and a dense copy of the weight costs nine times the packed bytes.
FUSED_MAX_ROWS: dict[int, int | None] = {80: 128, 86: None, 87: 128, 89: None, 90: 128, 100: 64, 103: 64, 120: None}
DEFAULT_FUSED_MAX_ROWS = 64
FLOAT32_FUSED_MAX_ROWS = 16


def portable(tile: Tile) -> Tile:
    """The same tile for GPUs that are not NVIDIA's."""
    return replace(tile, nb=min(tile.nb, PORTABLE_CHUNKS))


def tile_for(
    rows: int, grad: bool, capability: int, wide: bool, blocksize: int = CHUNK, tuned: Table | None = None
) -> Tile:
    """The tile for a product of `rows` rows.

    Args:
        rows: of x or dy. grad: for the input gradient.
        capability: of the GPU, 80 for 8.0. wide: x is float32.
        blocksize: weights that share a scale.
        tuned: what a GPU of this kind chose, which goes before the rules here, but for float32.
    """
    table: tuple[Tile, ...]
    if wide:
        table = FLOAT32_INPUT_GRAD if grad else FLOAT32_FORWARD
    elif tuned is not None:
        table = tuned.input_grad if grad else tuned.forward
    elif 90 <= capability < 100:
        table = HOPPER_INPUT_GRAD if grad else HOPPER_FORWARD
    elif 100 <= capability < 120:
        table = BLACKWELL_INPUT_GRAD if grad else BLACKWELL_FORWARD
    else:
        table = INPUT_GRAD if grad else FORWARD
    tile = next((tile for tile in table if max(rows, SMALLEST_ROWS) <= tile.rows), table[-1])
    if blocksize > CHUNK and tile == _DIRECT[1]:
        # Finding the scale of a chunk takes registers: with four chunks, or with two stages, eight bytes spill.
        return replace(tile, nb=2, stages=3)
    return tile


def rows_each(rows: int, experts: int) -> int:
    """The rows that most experts have no more of, when `rows` go to `experts` by chance: a tile for so many fits most.

    The counts are about Poisson's: the mean and two of its roots. Of experts without rows there is nothing to fit.
    """
    mean = rows / max(1, min(rows, experts))
    return min(rows, int(mean + 2 * mean**0.5)) if mean > 1 else 1


def split_for(tiles: int, steps: int, rows: int, depth: int, tile: Tile, multiprocessors: int) -> int:
    """The number of programs that share a tile: enough to fill the GPU, while each keeps two steps or more.

    Args:
        tiles: of the output. steps: of the loop in one tile. rows: of x. depth: length of what is summed over.
        tile: says the warps of a program, and how many a multiprocessor should have. multiprocessors: of the GPU.
    """
    wanted = tile.fill * multiprocessors
    split = 1
    for candidate in SPLITS[1:]:
        # Written and read, `candidate` float32 sums of each of `rows` outputs, against `depth` packed weights of half
        # a byte: beyond, the partial sums move four times the weight's bytes, in the second-level cache.
        heavy = 4 * candidate * rows > depth
        if tiles * split * tile.warps >= wanted or steps // candidate < 2 or heavy:
            break
        split = candidate
    return split


def fused_max_rows(capability: int, wide: bool, tuned: Table | None = None) -> int | None:
    """Rows up to which the fused kernels win, None for any number: as `tuned` says, else from the tables above."""
    if wide:
        return FLOAT32_FUSED_MAX_ROWS
    if tuned is not None:
        return tuned.fused_max_rows
    return FUSED_MAX_ROWS.get(capability, DEFAULT_FUSED_MAX_ROWS)

"""Products of a large 16-bit matrix with a thin float32 one, as LoRA's update has them, to float32's precision.

    out = s X F        X (rows, depth), 16 bits; F (depth, r); out (rows, r)

    low = s x A^T      X = x,     F = A^T          dA^T = x^T g       X = x^T,   F = g
    g   = s dy B       X = dy,    F = B            dB   = dy^T low    X = dy^T,  F = low

A float32 number has 24 bits, a bfloat16 one 8 and the same range. So F is the sum of three bfloat16 matrices, exactly,
and a bfloat16 X times F three products on tensor cores, whose sums are in float32: X is read once, as it came, where
the float32 product reads it, writes it twice as wide, and reads that. F is cut into its parts in registers. An F that
is rounded to 16 bits anyway, as under autocast, is one part.

Everything is addressed by strides, so that A and B, dA and dB are read and written where and as they lie.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import capability, interpreting, multiprocessors, on_device
from ..prepared import Prepared
from ..rounding_triton import _round_to
from .counters import workspace
from .decode import _dot, _store_or_reduce

# Programs that share a tile at most: the last of them adds up what all have left.
MAX_SPLIT = 32
# Sign, exponent and first 7 bits of a float32 number, which are a bfloat16 number. As int32.
_TOP_BITS = tl.constexpr(-0x10000)


@dataclass(frozen=True)
class Tile:
    """One shipped configuration of the kernel.

    Attributes:
        rows, ranks: of the output, in a tile (BI, BR). depth: of the sum, a step (BD).
        warps, stages: of the program; stages of asynchronous copies.
        fill: warps that a multiprocessor should have: a tile is shared until there are so many.
        steps: of the sum that a program that shares a tile has at least.
    """

    rows: int
    depth: int
    ranks: int
    warps: int
    stages: int
    fill: int = 8
    steps: int = 2


# Two warps: each cuts all of F into parts, so more would do the same work again.
_FEW = (Tile(16, 64, 16, 2, 3), Tile(16, 64, 32, 2, 3))
# By counts, unmeasured.
_AMPERE = (Tile(64, 64, 16, 2, 3), Tile(64, 64, 32, 2, 3))
# On a GPU of 9.0 and later, where with a depth of 64 a few bytes spill.
_LATER = (Tile(64, 32, 16, 2, 4), Tile(64, 32, 32, 2, 3))
# The fastest of eight tiles on an H200 (`first_contact/thin.py`): (the least rows of the output, the tile), for rank
# 16. Sums along a row of x, then sums over its rows.
_HOPPER_16 = (
    ((1024, Tile(64, 64, 16, 2, 3)), (17, Tile(32, 64, 16, 2, 3))),
    ((8192, Tile(128, 64, 16, 4, 3, steps=4)), (17, Tile(64, 64, 16, 4, 3, fill=7, steps=4))),
)
# Of larger ranks by counts: with four warps and 64 rows or more Hopper takes its own matrix instruction, which reads x
# from shared memory.
_HOPPER = (Tile(128, 64, 32, 4, 3), Tile(128, 32, 64, 4, 4))


def tile_for(width: int, rank: int, capability: int, over_rows: bool) -> Tile:
    """The tile for an output of (width, rank) on a GPU of a capability, 80 for 8.0."""
    if width <= _FEW[0].rows:
        table: tuple[Tile, ...] = _FEW
    elif capability == 90 and rank <= 16:
        return next(tile for least, tile in _HOPPER_16[over_rows] if width >= least)
    elif capability == 90 and width > _LATER[0].rows:
        table = _HOPPER
    else:
        table = _LATER if capability >= 90 else _AMPERE
    return next((tile for tile in table if rank <= tile.ranks), table[-1])


def split_for(tiles: int, tile: Tile, depth: int, multiprocessors: int) -> int:
    """The number of programs that share one of `tiles` tiles: enough to fill the GPU, each with some steps of the sum.

    Fewer steps, and the partial sums, written and read, would be as many bytes as x: 8 a rank and row against 2 a
    number of x.
    """
    steps = -(-depth // tile.depth)
    wanted = -(-tile.fill * multiprocessors // (tile.warps * tiles))
    split = max(1, min(wanted, MAX_SPLIT, steps // max(tile.steps, 4 * tile.ranks // tile.depth)))
    return -(-steps // -(-steps // split)) if steps else 1


@triton.jit
def _top(f):
    """The upper half of float32 numbers, as float32: bfloat16 numbers, rounded towards zero."""
    return (f.to(tl.int32, bitcast=True) & _TOP_BITS).to(tl.float32, bitcast=True)


# The number of rows changes from call to call: it must not choose the compiled kernel.
@triton.jit(do_not_specialize=("rows", "rank", "split"))
def _thin_product_kernel(
    x,
    f,
    out,
    workspace,
    counters,
    rows,
    columns,
    x_stride,
    f_depth,
    f_rank,
    out_row,
    out_rank,
    rank,
    split,
    scaling,
    BI: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """out = s X F, where X is x (rows, columns), or with OVER_ROWS its transpose: the sum is over x's rows.

    A program holds a (BI, BR) float32 tile of out and walks along the sum, BD at a step; `split` programs share a tile:

        x   [ BI x BD ] 16 bits, copied asynchronously, multiplied from shared memory
        f   [ BD x BR ] float32 -> PARTS tiles of 16 bits

    Bytes: x once for each BR ranks, f once for each BI of out's rows. Operations: 2 PARTS rows columns r.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    rank_tiles = tl.cdiv(rank, BR)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    i = (tile // rank_tiles) * BI + tl.arange(0, BI)
    r = (tile % rank_tiles) * BR + tl.arange(0, BR)
    width = columns if OVER_ROWS else rows
    depth = rows if OVER_ROWS else columns
    in_i = i < width
    in_r = r < rank

    share = tl.cdiv(tl.cdiv(depth, BD), split) * BD
    first = part * share
    last = tl.minimum(first + share, depth)
    d = first + tl.arange(0, BD)
    if OVER_ROWS:
        x_at = x + d[None, :].to(tl.int64) * x_stride + i[:, None]
    else:
        x_at = x + i[:, None].to(tl.int64) * x_stride + d[None, :]
    f_at = f + d[:, None].to(tl.int64) * f_depth + r[None, :].to(tl.int64) * f_rank

    acc = tl.zeros([BI, BR], tl.float32)
    for start in range(first, last, BD):
        in_d = start + tl.arange(0, BD) < depth
        xt = tl.load(x_at, mask=in_i[:, None] & in_d[None, :], other=0.0)
        ft = tl.load(f_at, mask=in_d[:, None] & in_r[None, :], other=0.0).to(tl.float32)
        # A step's sum begins at zero: what a tensor core cuts off, adding to its sum, stays small beside the whole.
        step = tl.zeros([BI, BR], tl.float32)
        if PARTS == 3:
            high = _top(ft)
            rest = ft - high
            middle = _top(rest)
            step = _dot(xt, (rest - middle).to(dtype), step, UPCAST)
            step = _dot(xt, middle.to(dtype), step, UPCAST)
            step = _dot(xt, high.to(dtype), step, UPCAST)
        else:
            step = _dot(xt, _round_to(ft, dtype), step, UPCAST)
        acc += step
        x_at += BD * (x_stride if OVER_ROWS else 1)
        f_at += BD * f_depth

    place = out + i[:, None].to(tl.int64) * out_row + r[None, :].to(tl.int64) * out_rank
    mask = in_i[:, None] & in_r[None, :]
    _store_or_reduce(acc * scaling, place, mask, workspace, counters, tile, part, split, TOGETHER)


def product(
    x: Tensor, factor: Tensor, dtype: torch.dtype, out: Tensor, scaling: float = 1.0, over_rows: bool = False
) -> None:
    """out = s x F, or with `over_rows` s x^T F, for a thin F.

    Args:
        x: (rows, columns), not empty: bfloat16, or float16 if `dtype` is.
        factor: F (columns, r), or with `over_rows` (rows, r), of any strides and floating dtype.
        dtype: float32 for a product to its precision, or x's: F is rounded to it, too.
        out: (rows, r), or with `over_rows` (columns, r), of any strides and floating dtype: it is written.
        scaling: s.

    A number of F that is not finite gives numbers that are not, and which may be NaN where float32 has infinity.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    device, rank = x.device, factor.shape[1]
    parts = 1 if x.dtype in (dtype, factor.dtype) else 3
    plan = _planned(
        *x.shape, rank, parts, over_rows, capability(device), multiprocessors(device), x.is_cuda or x.is_cpu
    )
    tensors = (x, factor, out, *workspace(device, plan.tiles, plan.split, plan.size))
    strides = (x.stride(0), *factor.stride(), *out.stride())
    numbers = (*x.shape, *strides, rank, plan.split, float(scaling))
    with on_device(x):
        plan.launch(tensors, numbers, (x.dtype, factor.dtype, out.dtype, strides))


@dataclass(frozen=True, slots=True)
class Plan:
    """The launch of a product of one shape. tiles: of the output; split: programs that share one; size: of a tile."""

    tiles: int
    split: int
    size: int
    launch: Prepared


@functools.lru_cache(maxsize=4096)
def _planned(
    rows: int,
    columns: int,
    rank: int,
    parts: int,
    over_rows: bool,
    capability: int,
    multiprocessors: int,
    cuda: bool,
) -> Plan:
    width, depth = (columns, rows) if over_rows else (rows, columns)
    tile = tile_for(width, rank, capability, over_rows)
    tiles = -(-width // tile.rows) * -(-rank // tile.ranks)
    split = split_for(tiles, tile, depth, multiprocessors)
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages if cuda and torch.version.hip is None else 2,
        "enable_fp_fusion": True,
    }
    launch = Prepared(_thin_product_kernel, (tiles, split), constants_of(tile, over_rows, parts), options)
    return Plan(tiles, split, tile.rows * tile.ranks, launch)


def constants_of(tile: Tile, over_rows: bool, parts: int) -> dict[str, int | bool]:
    """The constants that the kernel is compiled with."""
    sizes = {"BI": tile.rows, "BD": tile.depth, "BR": tile.ranks}
    # As many of the partial sums at once as registers hold.
    together = max(1, min(8, 127 * 32 * tile.warps // (tile.rows * tile.ranks)))
    return {**sizes, "OVER_ROWS": over_rows, "PARTS": parts, "UPCAST": interpreting(), "TOGETHER": together}

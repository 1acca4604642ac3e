"""NF4 quantization on a GPU, bit by bit as `nf4_quantize.py` does it: one pass over the weight, one over the scales.

Both passes are bound by bytes: a weight is read once (2 or 4 bytes) and leaves half a byte and, per block, four bytes
of scale. Nothing may be contracted or approximated: reciprocal and quotient are the correctly rounded ones, magnitudes
are compared as integers (so that subnormals count and a NaN shows in its block's scale).
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="annotation-unchecked"

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_device
from .codebooks import MIN_ABSMAX, NESTED_BLOCKSIZE, NF4_BOUNDARIES, dynamic_map, exact_thresholds

# Weights a program: 16 a thread at 4 warps, two 16-byte loads of bfloat16 each.
TILE = 2048
NUM_WARPS = 4
# Nested blocks of 256 scales a program.
NESTED_ROWS = 4

_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)


@triton.jit
def _magnitude(x):
    """float32 -> int32 that orders as |x| does, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _nearest_level(v, lowest, boundary):
    """The number of the 15 boundaries below v, float32 in [-1, 1]: int32 in 0..15.

    [-1, 1] is cut into cells of 1/16, in each of which lies one boundary or none: two look-ups and one comparison, ten
    instructions in all. A binary search by selections takes three times as many, and so do 15 comparisons.
    """
    cell = tl.floor(v * 16.0).to(tl.int32) + 16
    return tl.load(lowest + cell) + tl.where(v > tl.load(boundary + cell), 1, 0)


@triton.jit
def _nf4_quantize_kernel(w, lowest, boundary, codes, absmax, n, n_bytes, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A tile of ROWS blocks, each a row of BLOCK consecutive weights.

        w       [ block 0: BLOCK weights | block 1 | ... | tail: n % BLOCK ]     2 or 4 bytes a weight
        codes   [ w0 w1 | w2 w3 | ...    high nibble first, odd end: code 7 ]    1/2 byte a weight
        absmax  [ block 0 | block 1 | ... ]                                      4/BLOCK bytes a weight
        lowest, boundary (33,)  int32, float32, of each cell; in the first-level cache

    Bytes a weight (bfloat16, BLOCK 64): 2 + 0.5 + 0.06. Operations a weight: 1 product, 2 to clamp it, 3 for the
    magnitude and its maximum, 10 for the code, 1 to pack.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(w + place, mask=place < n, other=0.0).to(tl.float32)
    largest = tl.max(_magnitude(x), axis=1).to(tl.float32, bitcast=True)
    # A NaN must survive the maximum: by it the caller knows that the weight is not finite.
    raised = tl.where(largest < _MIN_ABSMAX, _MIN_ABSMAX, largest)
    # A short last block is divided by its scale, stored at MIN_ABSMAX at least; others times the reciprocal.
    short = (row + 1) * BLOCK > n
    tl.store(absmax + row, tl.where(short, raised, largest), mask=row * BLOCK < n)
    reciprocal = tl.div_rn(1.0, raised)
    v = x * reciprocal[:, None]
    if tl.program_id(0) == tl.num_programs(0) - 1:
        v = tl.where(short[:, None], tl.div_rn(x, tl.broadcast_to(raised[:, None], x.shape)), v)
    code = _nearest_level(tl.minimum(tl.maximum(v, -1.0), 1.0), lowest, boundary)
    high, low = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes + byte, ((high << 4) | low).to(tl.uint8), mask=byte < n_bytes)


@triton.jit
def _nearest_entry(v, thresholds):
    """The index of the nearest of 256 entries, a tie to the lower: how many of the 255 thresholds lie below v."""
    found = tl.zeros(v.shape, tl.int32)
    for i in tl.static_range(8):
        # Steps of 128, 64, .. 1.
        found += tl.where(v > tl.load(thresholds + (found + ((128 >> i) - 1))), 128 >> i, 0)
    return found


@triton.jit
def _quantize_absmax_kernel(
    absmax, offset, thresholds, codes, nested, blocks, NESTED: tl.constexpr, ROWS: tl.constexpr
):
    """A tile of ROWS nested blocks, each a row of NESTED consecutive scales.

        absmax  [ nested block 0: 256 scales | nested block 1 | ... ]   4 bytes a scale
        codes   [ one byte a scale ]
        nested  [ one float32 a nested block ]

    Bytes a scale: 4 + 1 + 4/256. Operations a scale: 8 look-ups in a table of 1 KB, 16 to search it, 5 more.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * NESTED + tl.arange(0, NESTED)[None, :]
    inside = place < blocks
    centred = tl.load(absmax + place, mask=inside, other=0.0) - tl.load(offset)
    centred = tl.where(inside, centred, 0.0)
    largest = tl.max(_magnitude(centred), axis=1).to(tl.float32, bitcast=True)
    tl.store(nested + row, largest, mask=row * NESTED < blocks)
    v = centred * tl.div_rn(1.0, largest)[:, None]
    # A block of zeros gives 0 * inf, for which code 0 is stored.
    v = tl.where(v == v, v, -1.0)
    tl.store(codes + place, _nearest_entry(v, thresholds).to(tl.uint8), mask=inside)


def quantize_into(w: Tensor, codes: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Launch the quantization of contiguous `w` into uint8 `codes` ((n+1)//2 elements) and float32 `absmax`."""
    n = w.numel()
    if n == 0:
        return
    rows = max(1, TILE // blocksize)
    grid = (-(-n // (rows * blocksize)),)
    with on_device(w):
        _nf4_quantize_kernel[grid](
            *(w, *_cells(w.device), codes, absmax, n, (n + 1) // 2),
            BLOCK=blocksize,
            ROWS=rows,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def quantize_absmax_into(absmax: Tensor, offset: Tensor, codes: Tensor, nested: Tensor) -> None:
    """Launch the quantization of contiguous float32 `absmax` less `offset` into uint8 `codes` and float32 `nested`."""
    blocks = absmax.numel()
    if blocks == 0:
        return
    grid = (-(-nested.numel() // NESTED_ROWS),)
    thresholds = _thresholds(absmax.device)
    constants = {"NESTED": NESTED_BLOCKSIZE, "ROWS": NESTED_ROWS}
    with on_device(absmax):
        _quantize_absmax_kernel[grid](
            *(absmax, offset, thresholds, codes, nested, blocks),
            **constants,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


@functools.cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell [i/16 - 1, (i+1)/16 - 1), and for 1: the boundaries below it, and the one within or infinity."""
    edges = torch.arange(34, device="cpu") / 16 - 1
    below = torch.bucketize(edges, NF4_BOUNDARIES)
    count = below[1:] - below[:-1]
    assert int(count.max()) == 1
    inside = NF4_BOUNDARIES[below[:-1].clamp(max=len(NF4_BOUNDARIES) - 1)]
    return below[:-1].int().to(device), torch.where(count == 1, inside, torch.inf).to(device)


@functools.cache
def _thresholds(device: torch.device) -> Tensor:
    return exact_thresholds(dynamic_map()).to(device)

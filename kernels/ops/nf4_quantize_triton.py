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

from .codebooks import NF4_BOUNDARIES, dynamic_map, exact_thresholds
from .dispatch import on_device
from .nf4_quantize import MIN_ABSMAX, NESTED_BLOCKSIZE

# Weights a program: 16 a thread at 4 warps, two 16-byte loads of bfloat16 each.
TILE = 2048
NUM_WARPS = 4
# Nested blocks of 256 scales a program.
NESTED_ROWS = 4

_BOUNDARIES = tl.constexpr(tuple(NF4_BOUNDARIES.tolist()))
_MIN_ABSMAX = tl.constexpr(MIN_ABSMAX)


@triton.jit
def _magnitude(x):
    """float32 -> int32 that orders as |x| does, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _nearest_level(v):
    """How many of the 15 boundaries lie below v: float32 -> int32 in 0..15.

    A binary search whose table is in the instructions: of the boundaries still possible, each comparison keeps a half.
    4 comparisons, 11 selections and 4 operations to put the bits together; 15 comparisons would take 30.
    """
    B: tl.constexpr = _BOUNDARIES
    c3 = v > B[7]
    b0, b1, b2 = tl.where(c3, B[8], B[0]), tl.where(c3, B[9], B[1]), tl.where(c3, B[10], B[2])
    b3 = tl.where(c3, B[11], B[3])
    b4, b5, b6 = tl.where(c3, B[12], B[4]), tl.where(c3, B[13], B[5]), tl.where(c3, B[14], B[6])
    c2 = v > b3
    b0, b1, b2 = tl.where(c2, b4, b0), tl.where(c2, b5, b1), tl.where(c2, b6, b2)
    c1 = v > b1
    c0 = v > tl.where(c1, b2, b0)
    return (tl.where(c3, 8, 0) | tl.where(c2, 4, 0)) | (tl.where(c1, 2, 0) | tl.where(c0, 1, 0))


@triton.jit
def _nf4_quantize_kernel(w, codes, absmax, n, n_bytes, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A tile of ROWS blocks, each a row of BLOCK consecutive weights.

        w       [ block 0: BLOCK weights | block 1 | ... | tail: n % BLOCK ]     2 or 4 bytes a weight
        codes   [ w0 w1 | w2 w3 | ...    high nibble first, odd end: code 7 ]    1/2 byte a weight
        absmax  [ block 0 | block 1 | ... ]                                      4/BLOCK bytes a weight

    Bytes a weight (bfloat16, BLOCK 64): 2 + 0.5 + 0.06. Operations a weight: 1 product, 3 for the magnitude and its
    maximum, 19 for the code, 1 to pack.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(w + place, mask=place < n, other=0.0).to(tl.float32)
    largest = tl.max(_magnitude(x), axis=1).to(tl.float32, bitcast=True)
    # A NaN must survive the maximum: it is what tells the caller.
    raised = tl.where(largest < _MIN_ABSMAX, _MIN_ABSMAX, largest)
    # The short last block divides and stores the raised scale; the others multiply by the rounded reciprocal.
    short = (row + 1) * BLOCK > n
    tl.store(absmax + row, tl.where(short, raised, largest), mask=row * BLOCK < n)
    reciprocal = tl.div_rn(1.0, raised)
    v = x * reciprocal[:, None]
    if tl.program_id(0) == tl.num_programs(0) - 1:
        v = tl.where(short[:, None], tl.div_rn(x, tl.broadcast_to(raised[:, None], x.shape)), v)
    code = _nearest_level(v)
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
    grid = (triton.cdiv(n, rows * blocksize),)
    with on_device(w):
        _nf4_quantize_kernel[grid](
            w, codes, absmax, n, (n + 1) // 2, BLOCK=blocksize, ROWS=rows, num_warps=NUM_WARPS, enable_fp_fusion=False
        )


def quantize_absmax_into(absmax: Tensor, offset: Tensor, codes: Tensor, nested: Tensor) -> None:
    """Launch the quantization of contiguous float32 `absmax` less `offset` into uint8 `codes` and float32 `nested`."""
    blocks = absmax.numel()
    if blocks == 0:
        return
    grid = (triton.cdiv(nested.numel(), NESTED_ROWS),)
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
def _thresholds(device: torch.device) -> Tensor:
    return exact_thresholds(dynamic_map()).to(device)

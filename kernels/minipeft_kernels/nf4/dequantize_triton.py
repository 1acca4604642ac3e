"""NF4 decoding on a GPU in one launch, doubly quantized scales included, bit by bit as `nf4_dequantize.py` does it.

bitsandbytes takes three launches for it (scales, offset, weights) and writes the scales in between. Here each block's
scale is decoded by the threads that use it: one byte, one table entry, one nested scale for every 64 weights.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import has_permutes, on_device
from ..packed import NF4
from ..prepared import Prepared
from ..rounding_triton import _round_to
from .checks import check_for_kernel
from .permutes_triton import _pairs_from_words, _scaled_planes

# Bytes a program writes, elsewhere: 16 a thread at 4 warps, in one access, neighbouring threads neighbouring bytes.
# (With more, the values would go through shared memory to be stored in this order.) Of a 16-bit dtype: 1024 weights.
TILE_BYTES = 2048
NUM_WARPS = 4

# By byte permutes: weights that a thread takes (16 bytes of codes), threads of a program. Measured on an H200: of 32
# or 64 weights, 64 to 256 threads, and one to four turns of a thread, these are the fastest, if by little.
COLUMNS = 32
ROWS = 64

_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _scales_of(block, inside, absmax, nested_absmax, nested_map, offset, NESTED: tl.constexpr, DOUBLE: tl.constexpr):
    """The scales of blocks, float32: map[code] * nested + offset (QLoRA, section 3), or as they are stored."""
    scale = tl.load(absmax + block, mask=inside, other=0)
    if DOUBLE:
        nested = tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(nested_map + scale.to(tl.int32)) * nested + tl.load(offset)
    return scale


@triton.jit
def _nf4_dequantize_kernel(
    out,
    codes,
    absmax,
    levels,
    nested_absmax,
    nested_map,
    offset,
    n,
    n_bytes,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS rows of COLS consecutive weights, each row within one block of BLOCK.

        codes          [ w0 w1 | w2 w3 | ...   high nibble first ]          1/2 byte a weight
        absmax         [ block 0 | block 1 | ... ]  uint8 or float32        1/BLOCK or 4/BLOCK bytes a weight
        nested_absmax  [ float32 for every NESTED blocks ]                  4/(BLOCK * NESTED) bytes a weight
        levels (16,), nested_map (256,)  float32, in the first-level cache
        out            [ w0 | w1 | w2 | ... ]                               2 or 4 bytes a weight

    Bytes a weight (bfloat16, BLOCK 64): 0.5 + 0.016 + 2. Operations a weight: one look-up with its address, one shift
    or mask, one product, half a conversion. The product is float32 and rounded once; a scale's product and sum are
    rounded apart, so the kernel is compiled without fused multiply-adds.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row * COLS < n
    block = row // (BLOCK // COLS)
    scale = _scales_of(block, inside, absmax, nested_absmax, nested_map, offset, NESTED, DOUBLE)
    byte = row[:, None] * (COLS // 2) + tl.arange(0, COLS // 2)[None, :]
    packed = tl.load(codes + byte, mask=byte < n_bytes, other=0).to(tl.int32)
    even = tl.load(levels + (packed >> 4)) * scale[:, None]
    odd = tl.load(levels + (packed & 15)) * scale[:, None]
    value = tl.join(even, odd).reshape(ROWS, COLS)
    place = row[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out + place, _round_to(value, DTYPE), mask=place < n)


@triton.jit
def _nf4_dequantize_pairs_kernel(
    out,
    codes,
    absmax,
    levels,
    nested_absmax,
    nested_map,
    offset,
    n_rows,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DOUBLE: tl.constexpr,
    BF16: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The same numbers in 16 bits, on NVIDIA hardware; a thread takes a row, COLS weights of one block.

    A block has one scale, so each of its weights is one of sixteen numbers, level * scale rounded: they are made first,
    and the packed codes pick among them by byte permutes, in place of a look-up, a product and a rounding a weight.

        codes          [ 8 weights | 8 weights | ... ]   taken as int32, COLS/8 words a row
        out            [ w0 w1 | w2 w3 | ... ]           taken as int32, two weights each, COLS/2 a row

    The rest is as in `_nf4_dequantize_kernel`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    block = row // (BLOCK // COLS)
    scale = _scales_of(block, inside, absmax, nested_absmax, nested_map, offset, NESTED, DOUBLE)
    # Not views, which take the host longer than this launch's arguments.
    words = codes.to(tl.pointer_type(tl.int32))
    two = out.to(tl.pointer_type(tl.int32))
    word = row[:, None] * (COLS // 8) + tl.arange(0, COLS // 8)[None, :]
    packed = tl.load(words + word, mask=inside[:, None], other=0)
    pairs = _pairs_from_words(packed, _scaled_planes(levels, scale[:, None], BF16))
    place = row[:, None] * (COLS // 2) + tl.arange(0, COLS // 2)[None, :]
    tl.store(two + place, pairs, mask=inside[:, None])


def dequantize_into(out: Tensor, weight: NF4) -> Tensor:
    """Launch the decoding into contiguous `out`, of any shape and the weight's size, and return it."""
    n = out.numel()
    if n == 0:
        return out
    assert out.is_contiguous()
    check_for_kernel(weight, out.device)
    # Without double quantization the nested tensors are not read; the kernel must be given some pointers all the same.
    given = (weight.quant_map if t is None else t for t in weight.tensors())
    codes, *others = (t if t.is_contiguous() else t.contiguous() for t in given)
    pairs = takes_pairs(out, codes, weight.blocksize)
    sizes = (n, weight.blocksize, weight.nested_blocksize)
    launch, numbers = _planned(*sizes, weight.nested_absmax is not None, out.dtype, (COLUMNS, ROWS) if pairs else None)
    with on_device(out):
        launch((out, codes, *others), numbers, None)
    return out


@functools.lru_cache(maxsize=1024)
def _planned(
    n: int,
    blocksize: int,
    nested_blocksize: int,
    double: bool,
    dtype: torch.dtype,
    pairs: tuple[int, int] | None,
) -> tuple[Prepared, tuple[int, ...]]:
    """The launch that decodes n weights, and the numbers that its kernel is given.

    Args:
        pairs: COLUMNS and ROWS, where `takes_pairs`.
    """
    numbers: tuple[int, ...]
    constants: dict[str, Any] = {"BLOCK": blocksize, "NESTED": nested_blocksize, "DOUBLE": double}
    if pairs is not None:
        columns, rows = pairs
        constants |= {"BF16": dtype == torch.bfloat16, "COLS": columns, "ROWS": rows}
        kernel, numbers, tile, warps = _nf4_dequantize_pairs_kernel, (n // columns,), columns * rows, rows // 32
    else:
        tile = TILE_BYTES // dtype.itemsize
        columns = min(blocksize, tile)
        constants |= {"DTYPE": _DTYPES[dtype], "ROWS": tile // columns, "COLS": columns}
        kernel, numbers, warps = _nf4_dequantize_kernel, (n, (n + 1) // 2), NUM_WARPS
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return Prepared(kernel, (-(-n // tile), 1), constants, options), numbers


def takes_pairs(out: Tensor, codes: Tensor, blocksize: int) -> bool:
    """True if decoding goes by byte permutes: 16 bits on NVIDIA hardware, whole rows, words at multiples of 4 bytes."""
    if out.dtype not in (torch.bfloat16, torch.float16) or not has_permutes(out.device):
        return False
    return not (out.numel() % COLUMNS or blocksize % COLUMNS or codes.data_ptr() % 4 or out.data_ptr() % 4)

"""The Triton kernel of x W^T for few rows: packed weights are decoded in the tensor core's own registers.

The product is computed transposed: W is the left operand of the tensor core, whose tile is 16 rows of W by 8 rows of
x, so that one row of x costs half of what it would on the other side.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from ..nf4.permutes_triton import _byte_planes, _pairs_from_bytes, _unpack_pairs
from ..rounding_triton import _round_to
from .decode import (
    UNSPECIALIZED,
    _add_low_rank,
    _block_scales,
    _dot,
    _portable_levels,
    _rows_of_tile,
    _store_or_reduce,
)


@triton.jit
def _column(t, j: tl.constexpr):
    """Column j of an (R, 1), (R, 2) or (R, 4) tensor: which registers, no instructions."""
    if t.shape[1] == 1:
        return tl.reshape(t, [t.shape[0]])
    elif t.shape[1] == 2:
        first, second = tl.split(t)
        if j == 0:
            return first
        else:
            return second
    else:
        # Not by calling itself: Triton 3.3 looks for all that a function calls, without end.
        even, odd = tl.split(tl.reshape(t, [t.shape[0], 2, 2]))
        if j % 2 == 0:
            first, second = tl.split(even)
        else:
            first, second = tl.split(odd)
        if j // 2 == 0:
            return first
        else:
            return second


@triton.jit
def _stored_scales(
    absmax,
    nested_absmax,
    n,
    N,
    row_scales,
    b,
    last,
    NB: tl.constexpr,
    SHIFT: tl.constexpr,
    DOUBLE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The scales of chunks b .. b + NB - 1 as they are stored, (BN, NB), and the nested scales above them."""
    chunk = b + tl.arange(0, NB)
    block = row_scales[:, None] + (chunk >> SHIFT)[None, :]
    inside = (n < N)[:, None] & (chunk < last)[None, :]
    stored = tl.load(absmax + block, mask=inside, other=0)
    nested = 0.0
    if DOUBLE and EVEN:
        # From a multiple of NB on, the scales of NB chunks have one nested block of 256 in common.
        first = row_scales + (b >> SHIFT)
        nested = tl.load(nested_absmax + (first >> 8), mask=n < tl.where(b < last, N, 0), other=0.0)[:, None]
    elif DOUBLE:
        nested = tl.load(nested_absmax + (block >> 8), mask=inside, other=0.0)
    return stored, nested


# The number of rows changes from call to call: it must not choose the compiled kernel.
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _nf4_matmul_direct_kernel(
    x,
    codes,
    absmax,
    levels,
    nested_absmax,
    nested_map,
    offset,
    bias,
    low,
    up,
    y,
    workspace,
    counters,
    offsets,
    M,
    N,
    row_chunks,
    x_stride,
    rank,
    experts,
    up_expert,
    up_row,
    up_rank,
    split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    SHIFT: tl.constexpr,
    NB: tl.constexpr,
    RT: tl.constexpr,
    DOUBLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PRMT: tl.constexpr,
    UPCAST: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """y = x W^T + bias + low up^T for few rows: packed bytes go to the tensor core's registers and are decoded there.

    A program holds a (BN, BM) float32 tile of y^T and walks along K, NB chunks of CHUNK weights at a step:

        codes   [n0: w0w1 w2w3 .. | chunk 1 .. | .. ]   CHUNK/2 bytes a chunk and row, K/2 bytes a row
                [n1: ..                             ]
        absmax  [n0: s0 s1 ..  n1: .. ]                 1 byte (float32: 4) a block of 2^SHIFT chunks
        x       [m0: K values  ] .. [m(BM-1)]           read transposed, (CHUNK, BM)

    A scale belongs to one row and one chunk, so it multiplies the chunk's partial product, BM values a row, instead of
    its CHUNK weights: BM / CHUNK operations a weight, and the weight is the level itself rounded to 16 bits.
    Bytes: N K / 2 + N K / blocksize once, x once per column of tiles, y. Operations: 2 M N K.
    `split` programs share a tile's K. EVEN: row_chunks divides by NB.
    EXPERTS above 0: x has the rows of many experts, sorted, and W, up and the scales one matrix an expert; a tile of
    rows is one expert's (`_rows_of_tile`), and the rows of nobody become zeros.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    tiles_n = tl.cdiv(N, BN)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    n = (tile % tiles_n) * BN + tl.arange(0, BN)
    first_row = (tile // tiles_n) * BM
    depth = row_chunks
    if EXPERTS > 0:
        expert, first_row, M = _rows_of_tile(offsets, tile // tiles_n, M, experts, BM, EXPERTS)
        if expert > experts:
            return
        depth = tl.where(expert == experts, 0, depth)
        rank = tl.where(expert == experts, 0, rank)
        expert = tl.minimum(expert, experts - 1).to(tl.int64)
        blocks = N * (row_chunks >> SHIFT)
        codes += expert * N * row_chunks * (CHUNK // 2)
        absmax += expert * blocks
        up += expert * up_expert
        if DOUBLE:
            nested_absmax += expert * ((blocks + 255) >> 8)
            offset += expert
    m = first_row + tl.arange(0, BM)
    in_n = n < N
    in_m = m < M

    acc = tl.zeros([BN, BM], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < tl.where(part == 0, N, 0), other=0.0).to(tl.float32)[:, None]
    if RT > 0:
        ranks = tl.where(part == 0, rank, 0)
        acc = _add_low_rank(acc, up, n.to(tl.int64) * up_row, up_rank, low, m, in_n, in_m, ranks, dtype, RT, UPCAST)

    share = tl.cdiv(tl.cdiv(row_chunks, NB), split) * NB
    first = part * share
    last = tl.minimum(first + share, depth)
    q_at = codes + n[:, None].to(tl.int64) * (row_chunks * (CHUNK // 2)) + first * (CHUNK // 2)
    q_at += tl.arange(0, CHUNK // 2)[None, :]
    x_at = x + m[None, :].to(tl.int64) * x_stride + first * CHUNK + tl.arange(0, CHUNK)[:, None]
    row_scales = n * (row_chunks >> SHIFT)
    shift = 0.0
    if DOUBLE:
        shift = tl.load(offset)
    if PRMT:
        planes = _byte_planes(levels, dtype == tl.bfloat16, (1, 1))

    # Read one step ahead: from byte to table entry to scale is a chain of loads, which the step's work covers.
    stored, nested = _stored_scales(absmax, nested_absmax, n, N, row_scales, first, last, NB, SHIFT, DOUBLE, EVEN)
    for b in range(first, last, NB):
        scales = _block_scales(stored, nested, nested_map, shift, DOUBLE)
        stored, nested = _stored_scales(absmax, nested_absmax, n, N, row_scales, b + NB, last, NB, SHIFT, DOUBLE, EVEN)
        for j in tl.static_range(NB):
            inside_n = in_n
            inside_m = in_m
            if not EVEN:
                inside_n = n < tl.where(b + j < last, N, 0)
                inside_m = m < tl.where(b + j < last, M, 0)
            q = tl.load(q_at + j * (CHUNK // 2), mask=inside_n[:, None], other=0)
            xt = tl.load(x_at + j * CHUNK, mask=inside_m[None, :], other=0.0)
            if PRMT:
                w = _unpack_pairs(_pairs_from_bytes(q, planes), dtype)
            else:
                w = _round_to(_portable_levels(q, levels), dtype)
            acc += _dot(w, xt, tl.zeros([BN, BM], tl.float32), UPCAST) * _column(scales, j)[:, None]
        q_at += NB * (CHUNK // 2)
        x_at += NB * CHUNK

    out = y + m[None, :].to(tl.int64) * N + n[:, None]
    _store_or_reduce(acc, out, in_n[:, None] & in_m[None, :], workspace, counters, tile, part, split)

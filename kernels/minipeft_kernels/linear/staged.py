"""The Triton kernel of dy W, and of x W^T for more rows: decoded weights go through shared memory.

Computed transposed, like the kernel for few rows (`nf4_matmul_direct`), with W's tile as the left operand.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from ..nf4.permutes_triton import _byte_planes, _pairs_from_words, _unpack_pairs
from ..rounding_triton import _round_to
from .decode import (
    UNSPECIALIZED,
    _add_low_rank,
    _block_scales,
    _dot,
    _portable_levels,
    _rows_of_tile,
    _scale_pairs,
    _store_or_reduce,
)


@triton.jit
def _scaled_tile(
    q,
    stored,
    nested,
    nested_map,
    shift,
    levels,
    planes,
    dtype: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRMT: tl.constexpr,
):
    """One chunk of each of R rows, decoded and scaled: int32 pairs (R, CHUNK/2), or without PRMT (R, CHUNK)."""
    scale = _block_scales(stored, nested, nested_map, shift, DOUBLE)[:, None]
    if PRMT:
        return _scale_pairs(_pairs_from_words(q, planes), scale, dtype == tl.bfloat16)
    else:
        return _round_to(_portable_levels(q, levels) * scale, dtype)


# The number of rows changes from call to call: it must not choose the compiled kernel.
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _nf4_matmul_staged_kernel(
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
    RT: tl.constexpr,
    DOUBLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    GRAD: tl.constexpr,
    PRMT: tl.constexpr,
    UPCAST: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """x W^T (many rows), or with GRAD dy W, where x is dy and y is dx: a decoded tile goes through shared memory.

    W's tile is BN rows by one chunk of CHUNK columns, from the same packed buffer both ways:

                    forward: walks along K ->                GRAD: walks down N
        codes   n0  [chunk b][b + 1] ..              n0      [chunk b]
                ..  [       ]                        ..      [BN rows]
                n0 + BN                              n0 + BN [then the next BN]
        y^T (BN, BM) += tile x^T (CHUNK, BM)         dx^T (CHUNK, BM) += tile^T dy^T (BN, BM)

    The transpose costs nothing: the tensor core's operand is read from shared memory by a transposing load. Packed
    words are read into registers two steps ahead and decoded one step ahead of the product that needs them, so a step
    is: product (tile from the last step), decode (words from the last step), load (for the next but one).
    Each weight is scaled: a scale belongs to a row, which in GRAD is summed over.
    Bytes: N K / 2 + N K / blocksize once, x once per column of tiles, y. Operations: 2 M N K.
    EVEN: N divides by BN. EXPERTS: as in the kernel for few rows.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    # Weights in one element of q.
    WORD: tl.constexpr = 8 if PRMT else 2
    tile = tl.program_id(0)
    part = tl.program_id(1)
    if GRAD:
        tiles = row_chunks
    else:
        tiles = tl.cdiv(N, BN)
    column = tile % tiles
    first_row = (tile // tiles) * BM
    depth = N if GRAD else row_chunks
    if EXPERTS > 0:
        expert, first_row, M = _rows_of_tile(offsets, tile // tiles, M, experts, BM, EXPERTS)
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
    in_m = m < M
    if GRAD:
        share = tl.cdiv(tl.cdiv(N, BN), split) * BN
        first = part * share
        last = tl.minimum(first + share, depth)
        row = first + tl.arange(0, BN)
        in_row = row < last
        b = column
        o = column * CHUNK + tl.arange(0, CHUNK)
        width = row_chunks * CHUNK
        walked = first + tl.arange(0, BN)
    else:
        share = tl.cdiv(row_chunks, split)
        first = part * share
        last = tl.minimum(first + share, depth)
        row = column * BN + tl.arange(0, BN)
        in_row = row < N
        b = first
        o = row
        width = N
        walked = first * CHUNK + tl.arange(0, CHUNK)
    in_o = o < width

    acc = tl.zeros([CHUNK if GRAD else BN, BM], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < tl.where(part == 0, width, 0), other=0.0).to(tl.float32)[:, None]
    if RT > 0:
        ranks = tl.where(part == 0, rank, 0)
        if GRAD:
            acc = _add_low_rank(acc, up, o, width, low, m, in_o, in_m, ranks, dtype, RT, UPCAST)
        else:
            acc = _add_low_rank(acc, up, o.to(tl.int64) * up_row, up_rank, low, m, in_o, in_m, ranks, dtype, RT, UPCAST)

    if PRMT:
        q_at = codes.to(tl.pointer_type(tl.int32))
        planes = _byte_planes(levels, dtype == tl.bfloat16, ())
    else:
        q_at = codes
        planes = 0
    pitch = row_chunks * (CHUNK // WORD)
    q_at += row[:, None].to(tl.int64) * pitch + b * (CHUNK // WORD) + tl.arange(0, CHUNK // WORD)[None, :]
    x_at = x + m[None, :].to(tl.int64) * x_stride + walked[:, None]
    row_scales = row * (row_chunks >> SHIFT)
    block = row_scales + (b >> SHIFT)
    q_step = BN * pitch if GRAD else CHUNK // WORD
    block_step = BN * (row_chunks >> SHIFT)
    shift = 0.0
    nested = 0.0
    if DOUBLE:
        shift = tl.load(offset)

    # Two tiles of packed words before the loop: the first is decoded at once, the second waits.
    inside = in_row if GRAD else row < tl.where(first < last, N, 0)
    q = tl.load(q_at, mask=inside[:, None], other=0)
    stored = tl.load(absmax + block, mask=inside, other=0)
    if DOUBLE:
        nested = tl.load(nested_absmax + (block >> 8), mask=inside, other=0.0)
    w = _scaled_tile(q, stored, nested, nested_map, shift, levels, planes, dtype, DOUBLE, PRMT)
    q_at += q_step
    block = block + block_step if GRAD else row_scales + ((first + 1) >> SHIFT)
    inside = (row + BN < last) if GRAD else row < tl.where(first + 1 < last, N, 0)
    q = tl.load(q_at, mask=inside[:, None], other=0)
    stored = tl.load(absmax + block, mask=inside, other=0)
    if DOUBLE:
        nested = tl.load(nested_absmax + (block >> 8), mask=inside, other=0.0)

    for i in range(first, last, BN if GRAD else 1):
        if GRAD and not EVEN:
            xt = tl.load(x_at, mask=in_m[None, :] & (i + tl.arange(0, BN) < last)[:, None], other=0.0)
        else:
            xt = tl.load(x_at, mask=in_m[None, :], other=0.0)
        if PRMT:
            wide = _unpack_pairs(w, dtype)
        else:
            wide = w
        acc = _dot(tl.trans(wide) if GRAD else wide, xt, acc, UPCAST)
        w = _scaled_tile(q, stored, nested, nested_map, shift, levels, planes, dtype, DOUBLE, PRMT)
        q_at += q_step
        block = block + block_step if GRAD else row_scales + ((i + 2) >> SHIFT)
        if GRAD and not EVEN:
            inside = i + 2 * BN + tl.arange(0, BN) < last
        elif GRAD:
            inside = row < tl.where(i + 2 * BN < last, last, 0)
        else:
            inside = row < tl.where(i + 2 < last, N, 0)
        q = tl.load(q_at, mask=inside[:, None], other=0)
        stored = tl.load(absmax + block, mask=inside, other=0)
        if DOUBLE:
            nested = tl.load(nested_absmax + (block >> 8), mask=inside, other=0.0)
        x_at += BN if GRAD else CHUNK

    out = y + m[None, :].to(tl.int64) * width + o[:, None]
    _store_or_reduce(acc, out, in_o[:, None] & in_m[None, :], workspace, counters, tile, part, split)

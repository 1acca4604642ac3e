"""Device code shared by the NF4 products: packed codes to levels, stored scales to float32, partial sums to one.

Levels are picked by byte permutes (`nf4/permutes_triton.py`), which NVIDIA hardware alone has: `PRMT=False` selects a
portable path (a table read by pointer), for the interpreter, for other GPUs and for float32, whose levels do not fit
two planes.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from ..rounding_triton import _round_to

# Arguments of the products that must not choose the compiled kernel.
UNSPECIALIZED = ("M", "rank", "experts", "up_expert", "up_row", "up_rank", "split")
_PAIR_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
_PAIR_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")
# a * b + (-0): sm_80 multiplies bfloat16 only by multiplying and adding.
_SCALE_BF16 = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")
_SCALE_FP16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")


@triton.jit
def _scale_pairs(pairs, scale, BF16: tl.constexpr):
    """Multiply both halves of (R, C/2) int32 pairs by the float32 (R, 1) scale, rounded to 16 bits first."""
    twice = tl.inline_asm_elementwise(
        _PAIR_BF16 if BF16 else _PAIR_FP16, "=r,r", [scale], dtype=tl.int32, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        _SCALE_BF16 if BF16 else _SCALE_FP16, "=r,r,r", [pairs, twice], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _portable_levels(q, levels):
    """(R, C/2) packed bytes -> (R, C) float32 levels, read from the table of sixteen."""
    even = tl.load(levels + (q >> 4).to(tl.int32))
    odd = tl.load(levels + (q & 15).to(tl.int32))
    return tl.join(even, odd).reshape(q.shape[0], q.shape[1] * 2)


@triton.jit
def _block_scales(stored, nested, nested_map, offset, DOUBLE: tl.constexpr):
    """Stored scales to float32: map[code] * nested + offset (QLoRA, section 3), or as they are when stored in float32.

    Multiply and add are fused where the compiler may: one rounding instead of two, half an ulp of a scale apart.
    """
    if DOUBLE:
        return tl.load(nested_map + stored.to(tl.int32)) * nested + offset
    else:
        return stored


@triton.jit
def _rows_of_tile(offsets, tile, rows, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile of BM rows or fewer, the tile's first row, and where the expert's rows end.

    Each expert's rows are cut into tiles, and after the last expert's those of nobody, whose number is `experts`:

        rows of x  [ 0 0 0 | 0 0 | 2 | 3 3 3 | nobody's ]        BM = 3: expert 1, without rows, has no tile
        tile         0       1     2   3       4                 later tiles: a number above `experts`

    Found by adding up how many tiles come before, in every program again: a few hundred clocks, no launch before this
    one, and nothing that the CPU must know. EXPERTS: a power of two above `experts`.
    """
    e = tl.arange(0, EXPERTS)
    stop = tl.load(offsets + e, mask=e < experts, other=rows)
    start = tl.load(offsets + e - 1, mask=(e > 0) & (e <= experts), other=0)
    start = tl.where(e > experts, rows, start)
    # Nobody has looked at the offsets: whatever they are, no row outside x is reached.
    start = tl.minimum(tl.maximum(start, 0), rows)
    stop = tl.minimum(tl.maximum(stop, start), rows)
    ends = tl.cumsum((stop - start + BM - 1) // BM, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= tile, ends, 0), 0)
    first = tl.sum(tl.where(e == expert, start, 0), 0) + (tile - before) * BM
    return expert, first, tl.sum(tl.where(e == expert, stop, 0), 0)


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b in float32. UPCAST: multiply 16-bit values in float32, exactly; the interpreter cannot otherwise."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _add_low_rank(
    acc, up, up_row, up_rank, low, m, in_rows, in_m, rank, dtype: tl.constexpr, RT: tl.constexpr, UPCAST: tl.constexpr
):
    """acc + up low^T for (R, rank) `up` given by pointers to its rows and (M, rank) `low`, RT ranks at a time."""
    for start in range(0, rank, RT):
        r = start + tl.arange(0, RT)
        in_r = r < rank
        u = tl.load(up + up_row[:, None] + r[None, :] * up_rank, mask=in_rows[:, None] & in_r[None, :], other=0.0)
        t = tl.load(low + m[None, :].to(tl.int64) * rank + r[:, None], mask=in_m[None, :] & in_r[:, None], other=0.0)
        acc = _dot(_round_to(u.to(tl.float32), dtype), _round_to(t.to(tl.float32), dtype), acc, UPCAST)
    return acc


@triton.jit
def _store_or_reduce(acc, out, mask, workspace, counters, tile, part, split, TOGETHER: tl.constexpr = 0):
    """Write a tile, or its partial sum; the last of `split` programs to arrive adds the parts up, always in one order.

    Args:
        acc: (R, C) float32. out: (R, C) pointers, with the mask of those to write.
        workspace: float32 (tiles, split, R * C). counters: int32 (tiles,), zero before and after.
        tile, part: of this program. split: a power of two, or with TOGETHER any number.
        TOGETHER: parts that are read at a time; 0 for as many as leave the loop of a product its registers.
    """
    dtype = out.dtype.element_ty
    if split == 1:
        tl.store(out, _round_to(acc, dtype), mask=mask)
    else:
        R: tl.constexpr = acc.shape[0]
        C: tl.constexpr = acc.shape[1]
        # Of few columns most may have no row of x: the sums of a column lie together, and those masked are not moved.
        # Otherwise all are: a mask would take the place of 16-byte accesses, and registers that the loop needs.
        FEW: tl.constexpr = C <= 8
        r = tl.arange(0, R)[:, None]
        c = tl.arange(0, C)[None, :]
        place = workspace + tile.to(tl.int64) * (split * R * C) + (c * R + r if FEW else r * C + c)
        # .cg: through the second-level cache, which all multiprocessors share.
        if FEW:
            tl.store(place + part * (R * C), acc, mask=mask, cache_modifier=".cg")
        else:
            tl.store(place + part * (R * C), acc, cache_modifier=".cg")
        # All stores of this program happen before its arrival is counted.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == split - 1:
            total = tl.zeros([R, C], tl.float32)
            # The loads of several parts wait together, of as many as registers hold.
            GROUP: tl.constexpr = TOGETHER if TOGETHER else 8 if FEW else 2 if R * C <= 1024 else 1
            for first in range(0, split, GROUP):
                for i in tl.static_range(GROUP):
                    at = place + (first + i) * (R * C)
                    if FEW:
                        there = mask & (r < tl.where(first + i < split, R, 0))
                        total += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
                    elif TOGETHER:
                        there = r < tl.where(first + i < split, R, 0)
                        total += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
                    else:
                        total += tl.load(at, cache_modifier=".cg")
            tl.store(out, _round_to(total, dtype), mask=mask)
            tl.store(counters + tile, 0)

"""Device code shared by the NF4 products: packed codes to levels, stored scales to float32, partial sums to one.

Four bits to a 16-bit level without memory, gathers or selects: a byte permute (`prmt`) picks four bytes at once out of
eight, by four selectors of four bits, and four packed codes *are* four such selectors. A table of sixteen 16-bit levels
is held in eight registers as two planes of sixteen bytes (low bytes, high bytes); see `prmt_assembly`.

Inline assembly exists only on NVIDIA hardware: `PRMT=False` selects a portable path (a table read by pointer), for the
interpreter, for other GPUs and for float32, whose levels do not fit two planes.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from ..rounding_triton import _round_to

# Arguments of the products that must not choose the compiled kernel.
UNSPECIALIZED = ("M", "rank", "experts", "up_expert", "up_row", "up_rank", "split")
# A selector nibble of prmt is three bits of a byte's index and a mode bit that must be zero.
INDEX_MASK = 0x77777777
# The bit that is left over chooses between the two half-tables: byte j of the first, or byte 4 + j, the second's.
HALF_MASK = 0x44444444
HALF_BASE = 0x32103210
PAIR_SELECTORS = (0x4051, 0x6273)


def prmt_assembly(stride: int) -> str:
    """PTX that decodes one register of four packed bytes into four registers, each two 16-bit levels in order.

    Operands: `$0..$3` out; `$4` in, bytes b0..b3 with the earlier weight in the high half; `$5`, `$(5 + stride)`, ...
    the table: low-byte plane (levels 0-3, 4-7, 8-11, 12-15), then high-byte plane; then 2^16 and 2^31. Triton names an
    argument once for each packed element, so `stride` is 4 where the bytes are elements and 1 where the words are.

    For each half of the register, nibbles n0..n3 = (w1, w0, w3, w2):

        s = q & 0x7777                      the index inside a half-table
        m = (q >> 1) & 0x4444 | 0x3210      byte j of the lower half-table's result, or byte 4 + j: the upper one's
        plane = prmt(prmt(T[0:8], s), prmt(T[8:16], s), m)      three permutes a plane, two planes
        pair 0 = prmt(low, high, 0x4051)    bytes low[1] high[1] low[0] high[0]: w0 below, w1 above
        pair 1 = prmt(low, high, 0x6273)    w2, w3

    In all 16 permutes, 3 shifts and 2 masks for 8 weights: 2.6 instructions a weight. The shifts are high halves of
    products, by factors that the assembler cannot see: a shift would go to the integer pipe, which takes two clocks an
    instruction and has the permutes to do, a product goes to the multiply-add pipe, which is idle.
    """
    *table, by_16, by_31 = (f"${5 + stride * i}" for i in range(10))
    lines = [
        ".reg .b32 q1, s0, s1, m0, m1, a, b, low, high;",
        f"mul.hi.u32 q1, $4, {by_31};",
        f"and.b32 s0, $4, {INDEX_MASK:#x};",
        f"mul.hi.u32 s1, s0, {by_16};",
        f"lop3.b32 m0, q1, {HALF_MASK:#x}, {HALF_BASE:#x}, 0xEA;",  # 0xEA: (a & b) | c
        f"mul.hi.u32 m1, m0, {by_16};",
    ]
    for half in range(2):
        for plane, t in (("low", table[:4]), ("high", table[4:])):
            lines += [
                f"prmt.b32 a, {t[0]}, {t[1]}, s{half};",
                f"prmt.b32 b, {t[2]}, {t[3]}, s{half};",
                f"prmt.b32 {plane}, a, b, m{half};",
            ]
        for pair, selector in enumerate(PAIR_SELECTORS):
            lines.append(f"prmt.b32 ${2 * half + pair}, low, high, {selector:#x};")
    return "{ " + " ".join(lines) + " }"


def table_assembly(convert: str) -> str:
    """PTX: four float32 levels `$2..$5` to a word of the low-byte plane, `$0`, and one of the high-byte plane, `$1`."""
    return (
        f"{{ .reg .b32 p, q; {convert} p, $3, $2; {convert} q, $5, $4; "
        "prmt.b32 $0, p, q, 0x6420; prmt.b32 $1, p, q, 0x7531; }"
    )


_DECODE_BYTES = tl.constexpr(prmt_assembly(stride=4))
_DECODE_WORDS = tl.constexpr(prmt_assembly(stride=1))
_OPERANDS_BYTES = tl.constexpr("=&r,=&r,=&r,=&r,r" + ",r" * 40)
_OPERANDS_WORDS = tl.constexpr("=&r,=&r,=&r,=&r,r" + ",r" * 10)
_TABLE_BF16 = tl.constexpr(table_assembly("cvt.rn.bf16x2.f32"))
_TABLE_FP16 = tl.constexpr(table_assembly("cvt.rn.f16x2.f32"))
_TABLE_OPERANDS = tl.constexpr("=&r,=&r,r,r,r,r")
_PAIR_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
_PAIR_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")
# a * b + (-0): sm_80 multiplies bfloat16 only by multiplying and adding.
_SCALE_BF16 = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")
_SCALE_FP16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
# A number that is zero in every lane; the assembler cannot know that, and so keeps the instruction.
_ZERO_A = ".reg .b32 a, b; mov.u32 a, %lanemask_lt; mov.u32 b, %lanemask_ge; and.b32 a, a, b;"
_LANE_ZERO = tl.constexpr(f"{{ {_ZERO_A} mov.b32 $0, a; }}")
_SHIFT_FACTORS = tl.constexpr(f"{{ {_ZERO_A} or.b32 $0, a, 0x10000; or.b32 $1, a, 0x80000000; }}")


@triton.jit
def _lane_zero(shape: tl.constexpr):
    """Zeros that look different from lane to lane, so that what is loaded from there goes to plain registers.

    A table read from one address by all lanes is kept in uniform registers, and prmt takes at most one of those: ptxas
    then copies a table word to a plain register before almost every permute, one instruction more a weight.
    """
    zeros = tl.zeros(shape, tl.int32)
    return tl.inline_asm_elementwise(_LANE_ZERO, "=r,r", [zeros], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _table_words(levels, BF16: tl.constexpr):
    four = [tl.load(levels), tl.load(levels + 1), tl.load(levels + 2), tl.load(levels + 3)]
    return tl.inline_asm_elementwise(
        _TABLE_BF16 if BF16 else _TABLE_FP16,
        _TABLE_OPERANDS,
        four,
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _byte_planes(levels, BF16: tl.constexpr, shape: tl.constexpr):
    """The sixteen float32 levels, rounded to 16 bits, as the ten words of `prmt_assembly`, each of `shape`.

    The shape decides where decoding happens. If every operand is a tensor, (1, 1), the compiler moves the change to
    the tensor cores' layout in front of the decoding, onto the packed bytes; with scalars, (), it stays behind it.
    """
    at = levels + _lane_zero(shape)
    l0, h0 = _table_words(at, BF16)
    l1, h1 = _table_words(at + 4, BF16)
    l2, h2 = _table_words(at + 8, BF16)
    l3, h3 = _table_words(at + 12, BF16)
    by_16, by_31 = tl.inline_asm_elementwise(
        _SHIFT_FACTORS, "=r,=r,r", [tl.load(at)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )
    return l0, l1, l2, l3, h0, h1, h2, h3, by_16, by_31


@triton.jit
def _pairs_from_bytes(q, p):
    """(R, C/2) packed bytes -> (R, C/2) int32, each two 16-bit levels, the earlier weight low; p of `_byte_planes`."""
    return tl.inline_asm_elementwise(
        _DECODE_BYTES,
        _OPERANDS_BYTES,
        [q, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9]],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _pairs_from_words(q, p):
    """(R, C/8) words of four packed bytes -> (R, C/2) int32 as above."""
    w0, w1, w2, w3 = tl.inline_asm_elementwise(
        _DECODE_WORDS,
        _OPERANDS_WORDS,
        [q, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    # (R, C/8, 2, 2): the last two axes count w0, w1, w2, w3.
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(q.shape[0], q.shape[1] * 4)


@triton.jit
def _unpack_pairs(pairs, dtype: tl.constexpr):
    """(R, C/2) int32 -> (R, C): no instruction at all, the registers are already what the tensor core takes."""
    even = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    odd = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(even, odd).reshape(pairs.shape[0], pairs.shape[1] * 2)


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
def _store_or_reduce(acc, out, mask, workspace, counters, tile, part, split):
    """Write a tile, or its partial sum; the last of `split` programs to arrive adds the parts up, always in one order.

    Args:
        acc: (R, C) float32. out: (R, C) pointers, with the mask of those to write.
        workspace: float32 (tiles, split, R * C). counters: int32 (tiles,), zero before and after.
        tile, part: of this program.
    """
    dtype = out.dtype.element_ty
    if split == 1:
        tl.store(out, _round_to(acc, dtype), mask=mask)
    else:
        R: tl.constexpr = acc.shape[0]
        C: tl.constexpr = acc.shape[1]
        # Parts read at a time, so that their loads wait together: as many as registers hold.
        GROUP: tl.constexpr = 8 if R * C <= 1024 else 4 if R * C <= 4096 else 1
        r = tl.arange(0, R)[:, None]
        c = tl.arange(0, C)[None, :]
        # Of few columns most may have no row of x: the sums of a column lie together, and those masked are not moved.
        place = workspace + tile.to(tl.int64) * (split * R * C) + (c * R + r if C <= 8 else r * C + c)
        # .cg: through the second-level cache, which all multiprocessors share.
        tl.store(place + part * (R * C), acc, mask=mask, cache_modifier=".cg")
        # All stores of this program happen before its arrival is counted.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == split - 1:
            total = tl.zeros([R, C], tl.float32)
            for first in range(0, split, GROUP):
                for i in tl.static_range(GROUP):
                    at = first + i
                    there = mask & (r < tl.where(at < split, R, 0))
                    total += tl.load(place + at * (R * C), mask=there, other=0.0, cache_modifier=".cg")
            tl.store(out, _round_to(total, dtype), mask=mask)
            tl.store(counters + tile, 0)

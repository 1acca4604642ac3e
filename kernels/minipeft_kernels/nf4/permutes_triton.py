"""Device code that finds 16-bit numbers by their 4-bit codes without memory, gathers or selects: byte permutes.

A byte permute (`prmt`) picks four bytes at once out of eight, by four selectors of four bits, and four packed codes
*are* four such selectors. A table of sixteen 16-bit numbers is held in eight registers as two planes of sixteen bytes
(low bytes, high bytes); see `prmt_assembly`. Inline assembly exists only on NVIDIA hardware.
"""
# Device code has no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

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
def _table_words(n0, n1, n2, n3, BF16: tl.constexpr):
    return tl.inline_asm_elementwise(
        _TABLE_BF16 if BF16 else _TABLE_FP16,
        _TABLE_OPERANDS,
        [n0, n1, n2, n3],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _factors(any):
    return tl.inline_asm_elementwise(_SHIFT_FACTORS, "=r,=r,r", [any], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def _byte_planes(levels, BF16: tl.constexpr, shape: tl.constexpr):
    """The sixteen float32 levels, rounded to 16 bits, as the ten words of `prmt_assembly`, each of `shape`.

    The shape decides where decoding happens. If every operand is a tensor, (1, 1), the compiler moves the change to
    the tensor cores' layout in front of the decoding, onto the packed bytes; with scalars, (), it stays behind it.
    """
    at = levels + _lane_zero(shape)
    l0, h0 = _table_words(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), BF16)
    l1, h1 = _table_words(tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), BF16)
    l2, h2 = _table_words(tl.load(at + 8), tl.load(at + 9), tl.load(at + 10), tl.load(at + 11), BF16)
    l3, h3 = _table_words(tl.load(at + 12), tl.load(at + 13), tl.load(at + 14), tl.load(at + 15), BF16)
    by_16, by_31 = _factors(tl.load(at))
    return l0, l1, l2, l3, h0, h1, h2, h3, by_16, by_31


@triton.jit
def _scaled_words(levels, scale, BF16: tl.constexpr):
    n0 = tl.load(levels) * scale
    n1 = tl.load(levels + 1) * scale
    n2 = tl.load(levels + 2) * scale
    n3 = tl.load(levels + 3) * scale
    return _table_words(n0, n1, n2, n3, BF16)


@triton.jit
def _scaled_planes(levels, scale, BF16: tl.constexpr):
    """The sixteen numbers level * scale, rounded to 16 bits, as `_byte_planes`: (R, 1) words for an (R, 1) scale."""
    l0, h0 = _scaled_words(levels, scale, BF16)
    l1, h1 = _scaled_words(levels + 4, scale, BF16)
    l2, h2 = _scaled_words(levels + 8, scale, BF16)
    l3, h3 = _scaled_words(levels + 12, scale, BF16)
    by_16, by_31 = _factors(scale)
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

"""Bit fields, byte permutes, funnel shifts, functions of bits and counts of them (PTX ISA 9.7.1, 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .lanes import DTYPES
from .program import SIZES, Instruction
from .registry import Context, Execute, only, opcode, pure, signed, unsupported

_U32 = np.uint32
Compute = Callable[..., np.ndarray]
_BITS = np.array([i.bit_count() for i in range(256)], np.uint8)


@opcode("shf")
def build_funnel(instruction: Instruction, context: Context) -> Execute:
    """A 32-bit window of the 64 bits b:a."""
    mods = only(instruction, ("l", "r", "wrap", "clamp"))
    left, wrap = "l" in mods, "wrap" in mods

    def compute(a: np.ndarray, b: np.ndarray, by: np.ndarray) -> np.ndarray:
        by = (by & _U32(31) if wrap else np.minimum(by, _U32(32))).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return (both << by) >> np.uint64(32) if left else both >> by

    return pure(instruction, context, compute, ("b32", "b32", "u32"), "b32")


@opcode("lop3")
def build_lop3(instruction: Instruction, context: Context) -> Execute:
    """Any function of three bits, by its table of truth."""
    only(instruction, ())
    table = context.lanes.constant(instruction.operands[4])
    if table is None:
        raise unsupported(instruction, "its table must be a constant")

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        if table == 0xEA:
            return a & b | c
        result = np.zeros(1, _U32)
        for row in range(8):
            if table >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return pure(instruction, context, compute, ("b32",) * 3, "b32", instruction.operands[1:4])


@opcode("bfe")
def build_extract(instruction: Instruction, context: Context) -> Execute:
    """`length` bits from `position` on, extended by the sign of the field's highest bit that exists."""
    only(instruction, ())
    kind = instruction.types[0]
    width = 8 * SIZES[kind]
    dtype, bits = DTYPES[kind], np.dtype(f"u{SIZES[kind]}").type

    def compute(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = position & _U32(0xFF), length & _U32(0xFF)
        raw = a.view(bits)
        field = np.where(position < width, raw >> np.minimum(position, _U32(width - 1)).astype(bits), bits(0))
        # Bits beyond the value's highest count as the sign.
        there = np.minimum(length, _U32(width) - np.minimum(position, _U32(width)))
        kept = np.minimum(there, _U32(width - 1)).astype(bits)
        mask = np.where(there < width, (bits(1) << kept) - bits(1), ~bits(0))
        if dtype.kind == "u":
            return field & mask
        last = np.minimum(position + length - _U32(1), _U32(width - 1)).astype(bits)
        sign = np.where(length == 0, bits(0), raw >> last & bits(1))
        return (field & mask | np.where(sign.astype(bool), ~mask, bits(0))).view(dtype)

    position, length = (context.lanes.constant(o) for o in instruction.operands[2:4])
    if dtype.kind == "u" and position is not None and length is not None and 0 < position + length <= width:
        shift, mask = np.array([position], bits), np.array([(1 << length) - 1], bits)
        return pure(instruction, context, lambda a: a >> shift & mask, (kind,), kind, instruction.operands[1:2])
    return pure(instruction, context, compute, (kind, "u32", "u32"), kind)


@opcode("bfi")
def build_insert(instruction: Instruction, context: Context) -> Execute:
    """The low `length` bits of a put into b at `position`."""
    only(instruction, ())
    kind = instruction.types[0]
    width, bits = 8 * SIZES[kind], DTYPES[kind].type

    def compute(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = position & _U32(0xFF), length & _U32(0xFF)
        kept = np.minimum(length, _U32(width - 1)).astype(bits)
        mask = np.where(length < width, (bits(1) << kept) - bits(1), ~bits(0))
        by = np.minimum(position, _U32(width - 1)).astype(bits)
        mask, value = mask << by, a << by
        return np.where(position < width, b & ~mask | value & mask, b)

    return pure(instruction, context, compute, (kind, kind, "u32", "u32"), kind)


@opcode("prmt")
def build_permute(instruction: Instruction, context: Context) -> Execute:
    """Four bytes out of eight, by selectors of four bits; bit 3 of one spreads the byte's sign."""
    if instruction.modifiers:
        raise unsupported(instruction, "only the generic byte permute is known")
    selector = context.lanes.constant(instruction.operands[3])
    if selector is not None:
        return pure(instruction, context, _fixed_permute(selector), ("b32", "b32"), "b32", instruction.operands[1:3])
    return pure(instruction, context, permute, ("b32",) * 3, "b32")


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32 with a selector that may differ from lane to lane."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result: np.ndarray | None = None
    signs = np.bitwise_or.reduce(selector) & 0x8888
    for i in range(4):
        # Eight times the byte's index.
        by = selector << _U32(3) if i == 0 else selector >> _U32(4 * i - 3)
        byte = both >> (by & _U32(0x38))
        byte = byte.astype(_U32) & _U32(0xFF)
        if signs >> (4 * i + 3) & 1:
            spread = (selector >> _U32(4 * i + 3) & _U32(1)).astype(bool)
            byte = np.where(spread, np.where(byte >= 128, _U32(0xFF), _U32(0)), byte)
        result = byte if result is None else result | byte << _U32(8 * i)
    assert result is not None
    return result


def _fixed_permute(selector: int) -> Compute:
    moves = [(selector >> 4 * i & 7, selector >> 4 * i & 8) for i in range(4)]

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.empty((max(a.size, b.size), 4), np.uint8)
        sources = [np.ascontiguousarray(s).view(np.uint8).reshape(-1, 4) for s in (a, b)]
        for i, (index, spread) in enumerate(moves):
            byte = sources[index >> 2][:, index & 3]
            result[:, i] = np.where(byte >= 128, 0xFF, 0) if spread else byte
        return result.view(_U32)[:, 0]

    return compute


@opcode("popc", "clz", "brev", "bfind")
def build_bits(instruction: Instruction, context: Context) -> Execute:
    """Bits counted, leading zeros, bits reversed, highest bit that differs from the sign."""
    mods = only(instruction, ("shiftamt",))
    kind = instruction.types[0]
    size = SIZES[kind]
    name = instruction.opcode
    if name == "brev":
        return pure(instruction, context, lambda a: _reverse(a, size), (kind,), kind)
    if name == "popc":
        return pure(instruction, context, count_bits, (kind,), "u32")
    if name == "clz":
        return pure(instruction, context, lambda a: 8 * size - 1 - _highest(a), (kind,), "u32")

    def find(a: np.ndarray) -> np.ndarray:
        highest = _highest(np.where(a < 0, ~a, a) if signed(kind) else a)
        return np.where(highest < 0, -1, 8 * size - 1 - highest if "shiftamt" in mods else highest)

    return pure(instruction, context, find, (kind,), "u32")


def _highest(a: np.ndarray) -> np.ndarray:
    """Index of the highest bit that is set, -1 for zero."""
    bits = a.view(f"u{a.dtype.itemsize}").astype(np.uint64)
    for by in (1, 2, 4, 8, 16, 32):
        bits = bits | bits >> np.uint64(by)
    return count_bits(bits).astype(np.int64) - 1


def count_bits(a: np.ndarray) -> np.ndarray:
    """The number of bits that are set in each value."""
    return _BITS[np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1)].sum(1)


def _reverse(a: np.ndarray, size: int) -> np.ndarray:
    unpacked = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, size), axis=1, bitorder="little")
    return np.packbits(unpacked[:, ::-1], axis=1, bitorder="little").copy().view(a.dtype)[:, 0]


@opcode("bmsk", "szext")
def build_masks(instruction: Instruction, context: Context) -> Execute:
    """bmsk: a mask of b bits from a on. szext: the low b bits of a, extended."""
    mods = only(instruction, ("clamp", "wrap"))
    kind = instruction.types[0]
    wrap = "wrap" in mods

    def amount(x: np.ndarray) -> np.ndarray:
        return (x & _U32(31) if wrap else np.minimum(x, _U32(32))).astype(np.uint64)

    def mask(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((np.uint64(1) << amount(b)) - np.uint64(1)) << amount(a)

    def extend(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        up = np.uint64(64) - amount(b)
        raw = np.where(amount(b) == 0, 0, a.view(_U32).astype(np.uint64) << np.minimum(up, np.uint64(63)))
        moved = raw.view(np.int64) if signed(kind) else raw
        return moved >> np.minimum(up, np.uint64(63)).astype(moved.dtype)

    if instruction.opcode == "bmsk":
        return pure(instruction, context, mask, ("u32", "u32"), "u32")
    return pure(instruction, context, extend, (kind, "u32"), kind)

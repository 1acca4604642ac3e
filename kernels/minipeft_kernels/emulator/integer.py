"""Integer arithmetic, logic and shifts (PTX ISA 9.7.1, 9.7.8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .lanes import DTYPES
from .program import SIZES, Instruction
from .registry import Context, Execute, only, opcode, pure, signed, unsupported

WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_U32 = np.uint32
Compute = Callable[..., np.ndarray]


def is_integer(kind: str) -> bool:
    """True if a type is an integer or plain bits."""
    return kind[0] in "usb" and kind != "bf16" and kind != "bf16x2"


def _saturating(compute: Compute) -> Compute:
    """32-bit signed with clamping instead of wrapping."""

    def clamped(*sources: np.ndarray) -> np.ndarray:
        wide = compute(*(s.astype(np.int64) for s in sources))
        return np.clip(wide, -(2**31), 2**31 - 1)

    return clamped


def build_add(instruction: Instruction, context: Context) -> Execute:
    """add and sub of integers; .sat for s32."""
    kind = instruction.types[0]
    compute: Compute = np.add if instruction.opcode == "add" else np.subtract
    if kind in ("u16x2", "s16x2"):
        return pure(instruction, context, _halves(compute, kind[:3]), (kind, kind), kind)
    if "sat" in only(instruction, ("sat",)):
        compute = _saturating(compute)
    return pure(instruction, context, compute, (kind, kind), kind)


def _halves(compute: Compute, kind: str) -> Compute:
    """Two 16-bit values a word."""

    def both(*sources: np.ndarray) -> np.ndarray:
        parts = [np.ascontiguousarray(s).view(DTYPES[kind]).reshape(-1, 2) for s in sources]
        return np.ascontiguousarray(compute(*parts)).astype(DTYPES[kind], copy=False).view(_U32)[:, 0]

    return both


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product, in the operands' type."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}")
        return (a.astype(wide) * b.astype(wide)) >> wide.type(8 * size)
    if a.dtype.kind == "i":
        high = high_product(a.view(np.uint64), b.view(np.uint64)).view(np.int64)
        return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + ((middle & mask) + a0 * b1 >> half)


def _product(instruction: Instruction) -> tuple[Compute, str]:
    """The product that mul and mad form, and its type."""
    kind = instruction.types[0]
    mods = only(instruction, ("lo", "hi", "wide", "sat"))
    if "wide" in mods:
        wide = DTYPES[WIDER[kind]]
        return lambda a, b: a.astype(wide) * b.astype(wide), WIDER[kind]
    if "hi" in mods:
        return high_product, kind
    if "lo" not in mods:
        raise unsupported(instruction, "expected .lo, .hi or .wide")
    return np.multiply, kind


def build_mul(instruction: Instruction, context: Context) -> Execute:
    """mul of integers."""
    compute, result = _product(instruction)
    kind = instruction.types[0]
    return pure(instruction, context, compute, (kind, kind), result)


def build_mad(instruction: Instruction, context: Context) -> Execute:
    """mad of integers."""
    product, result = _product(instruction)
    kind = instruction.types[0]
    if "sat" in instruction.modifiers:
        raise unsupported(instruction, "mad.hi.sat")
    dtype = DTYPES[result]
    return pure(
        instruction, context, lambda a, b, c: product(a, b).astype(dtype, copy=False) + c, (kind, kind, result), result
    )


@opcode("mul24", "mad24")
def build_mul24(instruction: Instruction, context: Context) -> Execute:
    """The low half of a 24-bit product, and a sum with it."""
    only(instruction, ("lo",))
    kind = instruction.types[0]
    shift = DTYPES[kind].type(8)

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a << shift >> shift) * (b << shift >> shift)

    if instruction.opcode == "mul24":
        return pure(instruction, context, product, (kind, kind), kind)
    return pure(instruction, context, lambda a, b, c: product(a, b) + c, (kind,) * 3, kind)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient towards zero; by zero all ones, as the hardware's routine gives."""
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    return np.where(zero, ~b, (a - np.fmod(a, safe)) // safe)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, b.dtype.type(1), b)))


def build_div(instruction: Instruction, context: Context) -> Execute:
    """div of integers."""
    only(instruction, ())
    kind = instruction.types[0]
    return pure(instruction, context, _divide, (kind, kind), kind)


@opcode("rem")
def build_rem(instruction: Instruction, context: Context) -> Execute:
    """Remainder with the dividend's sign."""
    only(instruction, ())
    kind = instruction.types[0]
    return pure(instruction, context, _remainder, (kind, kind), kind)


def build_minmax(instruction: Instruction, context: Context) -> Execute:
    """min and max of integers."""
    only(instruction, ())
    kind = instruction.types[0]
    compute: Compute = np.minimum if instruction.opcode == "min" else np.maximum
    if kind in ("u16x2", "s16x2"):
        compute = _halves(compute, kind[:3])
    return pure(instruction, context, compute, (kind, kind), kind)


def build_negative(instruction: Instruction, context: Context) -> Execute:
    """neg and abs of integers."""
    only(instruction, ())
    kind = instruction.types[0]
    return pure(instruction, context, np.negative if instruction.opcode == "neg" else np.abs, (kind,), kind)


@opcode("and", "or", "xor")
def build_logic(instruction: Instruction, context: Context) -> Execute:
    """Bitwise, of predicates too."""
    only(instruction, ())
    kind = instruction.types[0]
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instruction.opcode]
    return pure(instruction, context, compute, (kind, kind), kind)


@opcode("not", "cnot")
def build_not(instruction: Instruction, context: Context) -> Execute:
    """Complement; cnot: 1 for zero, else 0."""
    only(instruction, ())
    kind = instruction.types[0]
    if instruction.opcode == "cnot":
        return pure(instruction, context, lambda a: a == 0, (kind,), kind)
    return pure(instruction, context, np.invert, (kind,), kind)


@opcode("shl", "shr")
def build_shift(instruction: Instruction, context: Context) -> Execute:
    """Shifts by a 32-bit amount, clamped at the width."""
    only(instruction, ())
    kind = instruction.types[0]
    dtype = DTYPES[kind]
    width = 8 * SIZES[kind]
    left = instruction.opcode == "shl"
    shift = np.left_shift if left else np.right_shift
    amount = context.lanes.constant(instruction.operands[2])
    if amount is not None and 0 <= amount < width:
        by = np.array([amount], dtype)
        return pure(instruction, context, lambda a: shift(a, by), (kind,), kind, instruction.operands[1:2])
    arithmetic = not left and signed(kind)

    def compute(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        clamped = np.minimum(by, _U32(width - 1)).astype(dtype)
        return shift(a, clamped) if arithmetic else np.where(by >= width, dtype.type(0), shift(a, clamped))

    return pure(instruction, context, compute, (kind, "u32"), kind)


@opcode("sad")
def build_sad(instruction: Instruction, context: Context) -> Execute:
    """c + |a - b|."""
    only(instruction, ())
    kind = instruction.types[0]
    return pure(instruction, context, lambda a, b, c: c + np.where(a < b, b - a, a - b), (kind,) * 3, kind)


@opcode("dp4a")
def build_dot4(instruction: Instruction, context: Context) -> Execute:
    """c + the dot product of four bytes each."""
    only(instruction, ())
    kinds = instruction.types

    def unpack(x: np.ndarray, kind: str) -> np.ndarray:
        return np.ascontiguousarray(x).view(np.int8 if signed(kind) else np.uint8).reshape(-1, 4).astype(np.int64)

    def compute(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (unpack(a, kinds[0]) * unpack(b, kinds[1])).sum(1) + c

    result = "s32" if "s32" in kinds else "u32"
    return pure(instruction, context, compute, (*kinds[:2], result), result)

"""Opcodes that integers and floats share, comparisons, selections and moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floating, integer
from .lanes import DTYPES, elements, pick
from .program import SIZES, Instruction, Operand, Pair, Vector
from .registry import Builder, Context, Execute, only, opcode, pure, unsupported
from .rounding import bf16_to_f32, flush


def _by_type(names: tuple[str, ...], integers: Builder, floats: Builder) -> None:
    @opcode(*names)
    def build(instruction: Instruction, context: Context) -> Execute:
        if not instruction.types:
            raise unsupported(instruction, "it has no type")
        return (integers if integer.is_integer(instruction.types[0]) else floats)(instruction, context)


_by_type(("add", "sub"), integer.build_add, floating.build_add)
_by_type(("mul",), integer.build_mul, floating.build_mul)
_by_type(("mad",), integer.build_mad, floating.build_mad)
_by_type(("div",), integer.build_div, floating.build_div)
_by_type(("min", "max"), integer.build_minmax, floating.build_minmax)
_by_type(("neg", "abs"), integer.build_negative, floating.build_negative)

Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]
_ORDERED: dict[str, Compare] = {
    **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
_ORDERED |= {
    # Of floats, "ne" is false for a NaN and the forms with u are true for one.
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(instruction: Instruction, kind: str) -> Compare:
    """The comparison that setp and set name, of values as `Lanes.read` gives them."""
    mods = only(instruction, (*_ORDERED, *_COMBINE, "ftz"))
    compare = _ORDERED[next(m for m in instruction.modifiers if m in _ORDERED)]
    if kind in ("bf16", "bf16x2", "f16x2"):
        if kind != "bf16":
            raise unsupported(instruction, "packed comparisons")
        return lambda a, b: compare(bf16_to_f32(a), bf16_to_f32(b))
    if "ftz" in mods and kind == "f32":
        return lambda a, b: compare(flush(a), flush(b))
    return compare


@opcode("setp")
def build_setp(instruction: Instruction, context: Context) -> Execute:
    """p = a cmp b, or combined with c; p|q has the complement's combination too."""
    kind = instruction.types[0]
    compare = _comparison(instruction, kind)
    results = instruction.operands[0]
    first, second = (results.first, results.second) if isinstance(results, Pair) else (results, None)
    combine = next((_COMBINE[m] for m in instruction.modifiers if m in _COMBINE), None)
    sources = instruction.operands[1:]
    a, b = (context.lanes.read(o, kind) for o in sources[:2])
    c = context.lanes.read(sources[2], "pred") if combine is not None else None
    write = context.lanes.write(first, "pred")
    write_second = context.lanes.write(second, "pred") if second is not None else None

    def execute(lanes: np.ndarray | None) -> None:
        result = compare(a(lanes), b(lanes))
        other = ~result
        if combine is not None and c is not None:
            third = c(lanes)
            result, other = combine(result, third), combine(other, third)
        write(lanes, result)
        if write_second is not None:
            write_second(lanes, other)

    if combine is None and write_second is None:
        return lambda lanes: write(lanes, compare(a(lanes), b(lanes)))
    return execute


@opcode("set")
def build_set(instruction: Instruction, context: Context) -> Execute:
    """A comparison as a number: all ones, or 1.0."""
    result, kind = instruction.types[:2]
    compare = _comparison(instruction, kind)
    if any(m in _COMBINE for m in instruction.modifiers):
        raise unsupported(instruction, "a combination")
    true = np.array([-1], np.int64) if integer.is_integer(result) else np.array([1.0], np.float32)
    if result in ("bf16", "bf16x2", "f16x2"):
        raise unsupported(instruction, "a result of that type")
    return pure(instruction, context, lambda a, b: np.where(compare(a, b), true, 0 * true), (kind, kind), result)


@opcode("selp")
def build_selp(instruction: Instruction, context: Context) -> Execute:
    """a where p, else b."""
    only(instruction, ())
    kind = instruction.types[0]
    return pure(instruction, context, lambda a, b, p: pick(p, a, b), (kind, kind, "pred"), kind)


@opcode("slct")
def build_slct(instruction: Instruction, context: Context) -> Execute:
    """a where c >= 0, else b."""
    only(instruction, ("ftz",))
    kind, test = instruction.types
    return pure(instruction, context, lambda a, b, c: pick(c >= 0, a, b), (kind, kind, test), kind)


@opcode("cvta")
def build_cvta(instruction: Instruction, context: Context) -> Execute:
    """Global addresses are generic ones; the other spaces have no generic address here."""
    mods = only(instruction, ("to", "global"))
    if "global" not in mods:
        raise unsupported(instruction, "only global memory has generic addresses here")
    kind = instruction.types[0]
    return pure(instruction, context, lambda a: a, (kind,), kind)


@opcode("mov")
def build_mov(instruction: Instruction, context: Context) -> Execute:
    """Copies; packing of `{a, b}` into a register and unpacking of one."""
    only(instruction, ())
    kind = instruction.types[0]
    target, source = instruction.operands
    if isinstance(source, Vector):
        return _pack(instruction, context, elements(source), kind)
    if isinstance(target, Vector):
        return _unpack(context, elements(target), source, kind)
    read, write = context.lanes.read(source, kind), context.lanes.write(target, kind)
    return lambda lanes: write(lanes, read(lanes))


def _pack(instruction: Instruction, context: Context, parts: tuple[Operand, ...], kind: str) -> Execute:
    part = f"b{8 * SIZES[kind] // len(parts)}"
    reads = [context.lanes.read(p, part) for p in parts]
    write = context.lanes.write(instruction.operands[0], kind)

    def execute(lanes: np.ndarray | None) -> None:
        count = context.lanes.count if lanes is None else lanes.size
        words = np.empty((count, len(parts)), DTYPES[part])
        for i, read in enumerate(reads):
            words[:, i] = read(lanes)
        write(lanes, words.view(DTYPES[f"b{8 * SIZES[kind]}"])[:, 0].view(DTYPES[kind]))

    return execute


def _unpack(context: Context, parts: tuple[Operand, ...], source: Operand, kind: str) -> Execute:
    part = f"b{8 * SIZES[kind] // len(parts)}"
    read = context.lanes.read(source, kind)
    writes = [context.lanes.write(p, part) for p in parts]

    def execute(lanes: np.ndarray | None) -> None:
        words = np.ascontiguousarray(read(lanes)).view(DTYPES[part]).reshape(-1, len(parts))
        for i, write in enumerate(writes):
            write(lanes, words[:, i])

    return execute

"""Floating-point arithmetic (PTX ISA 9.7.3 to 9.7.5): exact results rounded once, as IEEE 754 and the ISA ask for.

Not rounded as on a GPU are the `.approx` instructions, whose last bits the ISA leaves open (ex2: 2 ulp, rcp: 1 ulp,
sin and cos: 2^-20.9 absolute, ...): here they are the exact value rounded to nearest. A compiler may also contract a
`mul` and an `add` without `.rn` to a fused multiply-add: here they stay apart, as the PTX says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import rounding
from .lanes import DTYPES
from .program import Instruction
from .registry import Context, Execute, only, opcode, pure, unsupported

Compute = Callable[..., np.ndarray]
_ROUND = (*rounding.MODES, "ftz", "sat", "relu", "NaN", "xorsign", "abs", "approx", "full", "noftz", "oob")
_SIGN32 = np.uint32(0x80000000)


def _mode(mods: set[str]) -> str:
    return next((m for m in rounding.MODES if m in mods), "rn")


def _arithmetic(instruction: Instruction, context: Context, compute: Compute, arity: int) -> Execute:
    """An operation on float64 whose result is exact or rounded to odd, for any type narrower than f64."""
    kind = instruction.types[0]
    mods = only(instruction, _ROUND)
    return pure(instruction, context, _typed(compute, kind, mods), (kind,) * arity, kind)


def _typed(compute: Compute, kind: str, mods: set[str]) -> Compute:
    """Widen the sources to float64, compute, round once to the type."""
    mode = _mode(mods)
    if kind == "f32":
        return _finish32(lambda *s: rounding.to_f32(compute(*(x.astype(np.float64) for x in s)), mode), mods)
    if kind in ("f16", "f16x2"):
        return _finish16(lambda *s: rounding.to_f16(compute(*(x.astype(np.float64) for x in s)), mode), kind, mods)

    def narrow(*sources: np.ndarray) -> np.ndarray:
        wide = compute(*(rounding.bf16_to_f32(x).astype(np.float64) for x in sources))
        return rounding.f64_to_bf16(wide, mode)

    return _finish16(narrow, kind, mods)


def _finish32(compute: Compute, mods: set[str]) -> Compute:
    """float32 with .ftz on both sides, .sat, .relu, and the hardware's NaN."""
    ftz, saturate, relu = "ftz" in mods, "sat" in mods, "relu" in mods
    if not (ftz or saturate or relu):
        return lambda *sources: rounding.canonical(compute(*sources))

    def finished(*sources: np.ndarray) -> np.ndarray:
        if ftz:
            sources = tuple(rounding.flush(s) for s in sources)
        result = compute(*sources)
        if ftz:
            result = rounding.flush(result)
        if saturate:
            result = np.where(np.isnan(result), np.float32(0), np.clip(result, np.float32(0), np.float32(1)) + 0)
        if relu:
            result = np.where(result < 0, np.float32(0), result)
        return rounding.canonical(result)

    return finished


def _finish16(compute: Compute, kind: str, mods: set[str]) -> Compute:
    """float16 or bfloat16 (as bits), alone or two in a word."""
    saturate, relu = "sat" in mods, "relu" in mods
    dtype = np.dtype(np.float16) if kind[0] == "f" else np.dtype(np.uint16)
    one = 0x3C00 if kind[0] == "f" else 0x3F80
    nan = 0x7C00 if kind[0] == "f" else 0x7F80

    def finished(*sources: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(compute(*sources)).view(np.uint16)
        if saturate or relu:
            is_nan = (bits & np.uint16(0x7FFF)) > nan
            bits = np.where((bits >> np.uint16(15) == 1) & ~(is_nan & relu), np.uint16(0), bits)
            if saturate:
                bits = np.where(is_nan, np.uint16(0), np.minimum(bits, np.uint16(one)))
        return bits

    if kind.endswith("x2"):

        def packed(*sources: np.ndarray) -> np.ndarray:
            halves = [np.ascontiguousarray(s).view(dtype) for s in sources]
            if len({h.size for h in halves}) > 1:
                halves = list(np.broadcast_arrays(*(h.reshape(-1, 2) for h in halves)))
                halves = [np.ascontiguousarray(h).reshape(-1) for h in halves]
            return finished(*halves).view(np.uint32)

        return packed
    return lambda *sources: finished(*sources).view(DTYPES[kind])


def build_add(instruction: Instruction, context: Context) -> Execute:
    """add and sub."""
    kind = instruction.types[0]
    mods = only(instruction, _ROUND)
    subtract = instruction.opcode == "sub"
    plain: Compute = np.subtract if subtract else np.add
    if kind == "f64":
        return _double(instruction, context, plain, mods, 2)
    if kind == "f32" and _mode(mods) == "rn":
        return pure(instruction, context, _finish32(plain, mods), (kind, kind), kind)
    compute: Compute = (lambda a, b: rounding.sum_to_odd(a, -b)) if subtract else rounding.sum_to_odd
    return _arithmetic(instruction, context, compute, 2)


def build_mul(instruction: Instruction, context: Context) -> Execute:
    """mul: products of narrower types are exact in float64."""
    kind = instruction.types[0]
    mods = only(instruction, _ROUND)
    if kind == "f64":
        return _double(instruction, context, np.multiply, mods, 2)
    if kind == "f32" and _mode(mods) == "rn":
        return pure(instruction, context, _finish32(np.multiply, mods), (kind, kind), kind)
    return _arithmetic(instruction, context, np.multiply, 2)


def _double(instruction: Instruction, context: Context, compute: Compute, mods: set[str], arity: int) -> Execute:
    if _mode(mods) != "rn":
        raise unsupported(instruction, "float64 is rounded to nearest only")
    return pure(instruction, context, compute, ("f64",) * arity, "f64")


def fma_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded to odd, for float64 values that fit float32: their products are exact."""
    return rounding.sum_to_odd(a * b, c)


@opcode("fma")
def build_fma(instruction: Instruction, context: Context) -> Execute:
    """a * b + c, rounded once."""
    kind = instruction.types[0]
    mods = only(instruction, _ROUND)
    if kind == "f64":
        return _double(instruction, context, rounding.fma_f64, mods, 3)
    if kind == "bf16x2" and mods <= {"rn"}:
        exact = _typed(fma_to_odd, kind, mods)
        return pure(instruction, context, lambda a, b, c: _scaled_or(exact, a, b, c), (kind,) * 3, kind)
    return _arithmetic(instruction, context, fma_to_odd, 3)


def _scaled_or(exact: Compute, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """bfloat16 products with -0 added, which is how sm_80 multiplies: their float32 product is exact unless tiny."""
    if c.size == 1 and c[0] == 0x80008000:
        low = _high_halves(a << np.uint32(16)) * _high_halves(b << np.uint32(16))
        high = _high_halves(a) * _high_halves(b)
        smallest = min(np.abs(low).min(initial=1), np.abs(high).min(initial=1))
        if smallest > 1e-30:
            return rounding.f32_to_bf16(low) | rounding.f32_to_bf16(high).astype(np.uint32) << np.uint32(16)
    return exact(a, b, c)


def _high_halves(word: np.ndarray) -> np.ndarray:
    return (word & np.uint32(0xFFFF0000)).view(np.float32)


def build_mad(instruction: Instruction, context: Context) -> Execute:
    """mad of floats is fma."""
    return build_fma(instruction, context)


def build_div(instruction: Instruction, context: Context) -> Execute:
    """div: .approx and .full are rounded to nearest too."""
    kind = instruction.types[0]
    mods = only(instruction, _ROUND)
    if kind == "f64":
        return _double(instruction, context, np.divide, mods, 2)
    if _mode(mods) == "rn":
        return pure(instruction, context, _finish32(np.divide, mods), (kind, kind), kind)
    return _arithmetic(instruction, context, rounding.quotient_to_odd, 2)


@opcode("rcp", "sqrt", "rsqrt")
def build_root(instruction: Instruction, context: Context) -> Execute:
    """Reciprocals and roots."""
    kind = instruction.types[0]
    mods = only(instruction, _ROUND)
    wide: dict[str, Compute] = {
        "rcp": lambda a: rounding.quotient_to_odd(np.ones_like(a), a),
        "sqrt": rounding.root_to_odd,
        "rsqrt": lambda a: 1 / np.sqrt(a),
    }
    if kind == "f64":
        plain: dict[str, Compute] = {"rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": wide["rsqrt"]}
        return _double(instruction, context, plain[instruction.opcode], mods, 1)
    return _arithmetic(instruction, context, wide[instruction.opcode], 1)


@opcode("ex2", "lg2", "sin", "cos", "tanh")
def build_transcendental(instruction: Instruction, context: Context) -> Execute:
    """The approximations of the special function unit: here the float64 function, rounded once."""
    functions = {"ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh}
    if "approx" not in instruction.modifiers:
        raise unsupported(instruction, "expected .approx")
    return _arithmetic(instruction, context, functions[instruction.opcode], 1)


def build_negative(instruction: Instruction, context: Context) -> Execute:
    """neg and abs: of the sign bit, NaN or not."""
    kind = instruction.types[0]
    mods = only(instruction, ("ftz",))
    bits = np.dtype(f"u{DTYPES[kind].itemsize}").type
    width = 8 * DTYPES[kind].itemsize
    sign = bits(1 << width - 1) if not kind.endswith("x2") else bits(0x80008000)

    def compute(a: np.ndarray) -> np.ndarray:
        if "ftz" in mods and kind == "f32":
            a = rounding.flush(a)
        raw = a.view(bits)
        return (raw ^ sign if instruction.opcode == "neg" else raw & ~sign).view(DTYPES[kind])

    return pure(instruction, context, compute, (kind,), kind)


def build_minmax(instruction: Instruction, context: Context) -> Execute:
    """min and max: a NaN loses unless .NaN is given; -0 is less than +0."""
    kind = instruction.types[0]
    mods = only(instruction, ("ftz", "NaN", "xorsign", "abs"))
    if "xorsign" in mods:
        raise unsupported(instruction, ".xorsign.abs")
    smaller, propagate = instruction.opcode == "min", "NaN" in mods

    def compute(*sources: np.ndarray) -> np.ndarray:
        result = sources[0]
        for other in sources[1:]:
            result = _extreme(result, other, smaller, propagate)
        return result

    arity = len(instruction.operands) - 1
    if kind == "f32":
        return pure(instruction, context, _finish32(compute, mods), (kind,) * arity, kind)
    if kind == "f64":
        return pure(instruction, context, compute, (kind,) * arity, kind)
    if kind in ("f16", "f16x2"):
        narrow: Compute = lambda *s: rounding.canonical(compute(*s))  # noqa: E731
    else:
        narrow = lambda *s: rounding.f32_to_bf16(compute(*(rounding.bf16_to_f32(x) for x in s)))  # noqa: E731
    return pure(instruction, context, _finish16(narrow, kind, mods), (kind,) * arity, kind)


def _extreme(a: np.ndarray, b: np.ndarray, smaller: bool, propagate: bool) -> np.ndarray:
    function = (np.minimum if propagate else np.fmin) if smaller else (np.maximum if propagate else np.fmax)
    result = function(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        raw = [x.view(f"u{x.dtype.itemsize}") for x in np.broadcast_arrays(a, b, result)]
        signed = raw[0] | raw[1] if smaller else raw[0] & raw[1]
        result = np.where(zeros, signed, raw[2]).view(result.dtype)
    return result


@opcode("copysign")
def build_copysign(instruction: Instruction, context: Context) -> Execute:
    """b with the sign of a."""
    kind = instruction.types[0]
    only(instruction, ())
    return pure(instruction, context, lambda a, b: np.copysign(b, a), (kind, kind), kind)


@opcode("testp")
def build_test(instruction: Instruction, context: Context) -> Execute:
    """True if a float is of a kind."""
    kind = instruction.types[0]
    tiny = np.finfo(DTYPES[kind]).tiny
    tests: dict[str, Compute] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    (name,) = only(instruction, tests)
    return pure(instruction, context, tests[name], (kind,), "pred")

"""cvt: every pair of types, every rounding (PTX ISA 9.7.9.21)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import float8, rounding
from .integer import is_integer
from .lanes import DTYPES
from .program import SIZES, Instruction
from .registry import Context, Execute, only, opcode, pure, unsupported

Compute = Callable[..., np.ndarray]
_TO_INTEGER: dict[str, Compute] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_MODIFIERS = (*rounding.MODES, *_TO_INTEGER, "ftz", "sat", "relu", "satfinite", "rna")


@opcode("cvt")
def build_cvt(instruction: Instruction, context: Context) -> Execute:
    """Any conversion."""
    mods = only(instruction, _MODIFIERS)
    result, kind = instruction.types
    sources = instruction.operands[1:]
    if result.endswith("x2") and kind == "f32":
        compute: Compute = _packing(instruction, result, mods)
        return pure(instruction, context, compute, ("f32",) * len(sources), result)
    if result[:2] in ("e4", "e5") or kind[:2] in ("e4", "e5"):
        return pure(instruction, context, float8.between(instruction, result, kind, mods), (kind,), result)
    if is_integer(result):
        compute = _between_integers(result, mods) if is_integer(kind) else _to_integer(result, kind, mods)
    elif is_integer(kind):
        compute = _from_integer(result, mods)
    elif result == "tf32":
        compute = _to_tf32("rna" in mods)
    else:
        compute = _between_floats(result, kind, mods)
    return pure(instruction, context, compute, (kind,), result)


def _between_integers(result: str, mods: set[str]) -> Compute:
    limits = np.iinfo(DTYPES[result])
    if "sat" not in mods:
        return lambda a: a

    def clamp(a: np.ndarray) -> np.ndarray:
        low, high = max(limits.min, np.iinfo(a.dtype).min), min(limits.max, np.iinfo(a.dtype).max)
        return np.clip(a, a.dtype.type(low), a.dtype.type(high))

    return clamp


def _widen(kind: str, ftz: bool) -> Compute:
    """A float of any type to float64, exactly."""
    if kind == "bf16":
        return lambda a: rounding.bf16_to_f32(a).astype(np.float64)
    if kind == "f32" and ftz:
        return lambda a: rounding.flush(a).astype(np.float64)
    return lambda a: a.astype(np.float64)


def _to_integer(result: str, kind: str, mods: set[str]) -> Compute:
    """Clamped to the type; a NaN is 0, or the highest bit alone where one of the two types has 64 bits."""
    limits = np.iinfo(DTYPES[result])
    whole = next((_TO_INTEGER[m] for m in mods if m in _TO_INTEGER), np.rint)
    widen = _widen(kind, "ftz" in mods)
    nan = limits.min if result[0] == "s" else 1 << 63
    nan = nan if SIZES[result] == 8 else (1 << 8 * SIZES[result] - 1 if kind == "f64" else 0)
    wide = np.dtype(np.int64) if result[0] == "s" else np.dtype(np.uint64)
    # The first float beyond the type: the limit itself may not be one.
    beyond = float(limits.max + 1)

    def compute(a: np.ndarray) -> np.ndarray:
        value = whole(widen(a))
        inside = (value >= limits.min) & (value < beyond)
        kept = np.where(inside, value, 0.0).astype(wide)
        if inside.all():
            return kept
        kept = np.where(value >= beyond, wide.type(limits.max), kept)
        kept = np.where(value < limits.min, wide.type(limits.min), kept)
        return np.where(np.isnan(value), np.array([nan]).astype(wide), kept)

    return compute


def _from_integer(result: str, mods: set[str]) -> Compute:
    mode = next((m for m in rounding.MODES if m in mods), "rn")

    def compute(a: np.ndarray) -> np.ndarray:
        if result in ("f32", "f64") and mode == "rn":
            return a.astype(DTYPES[result])
        exact = a.astype(np.float64)
        if a.dtype.itemsize == 8:
            exact = _odd_from_64_bits(a, exact)
        if result == "f32":
            return rounding.to_f32(exact, mode)
        if result == "f64":
            return exact
        return rounding.to_f16(exact, mode) if result == "f16" else rounding.f64_to_bf16(exact, mode)

    return compute


def _odd_from_64_bits(a: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """A 64-bit integer as float64 rounded to odd."""
    high = (a >> a.dtype.type(32)).astype(np.float64) * 2.0**32
    low = (a & a.dtype.type(0xFFFFFFFF)).astype(np.float64)
    total, error = rounding.two_sum(high, low)
    return rounding.odd(np.where(total == nearest, total, nearest), error)


def _to_tf32(ties_away: bool) -> Compute:
    """Ten bits of mantissa; the low thirteen of the word are zero."""

    def compute(a: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(a).view(np.uint32)
        tie = np.uint32(0x1000) if ties_away else np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
        rounded = bits + tie & np.uint32(0xFFFFE000)
        return np.where(np.isnan(a), np.uint32(rounding.NAN32), rounded)

    return compute


def _between_floats(result: str, kind: str, mods: set[str]) -> Compute:
    mode = next((m for m in rounding.MODES if m in mods), "rn")
    whole = next((_TO_INTEGER[m] for m in mods if m in _TO_INTEGER), None)
    widen = _widen(kind, "ftz" in mods)
    relu, saturate, ftz = "relu" in mods, "sat" in mods, "ftz" in mods
    if kind == "bf16" and result == "f32" and not (relu or saturate or whole or ftz):
        return rounding.bf16_to_f32
    if kind == "f32" and result == "bf16" and not (relu or saturate or whole):
        return lambda a: rounding.f32_to_bf16(a, mode)
    if (kind, result) in (("f32", "f16"), ("f16", "f32")) and not (relu or saturate or whole or ftz) and mode == "rn":
        return lambda a: rounding.canonical(a.astype(DTYPES[result]))

    def compute(a: np.ndarray) -> np.ndarray:
        value = widen(a)
        if whole is not None:
            value = whole(value)
        if saturate:
            value = np.where(np.isnan(value), 0.0, np.clip(value, 0.0, 1.0) + 0.0)
        if relu:
            value = np.where(value < 0, 0.0, value)
        if result == "f64":
            return value
        if result == "f32":
            narrow = rounding.canonical(rounding.to_f32(value, mode))
            return rounding.flush(narrow) if ftz else narrow
        return rounding.to_f16(value, mode) if result == "f16" else rounding.f64_to_bf16(value, mode)

    return compute


def _packing(instruction: Instruction, result: str, mods: set[str]) -> Compute:
    """Two float32 to a word: the first source is the upper half."""
    mode = next((m for m in rounding.MODES if m in mods), "rn")
    relu = "relu" in mods
    if result[:2] in ("e4", "e5"):
        return float8.packing(instruction, result, mods)
    if result not in ("f16x2", "bf16x2") or "satfinite" in mods:
        raise unsupported(instruction, "a packed result of that kind")

    def narrow(a: np.ndarray) -> np.ndarray:
        if relu:
            a = np.where(a < 0, np.float32(0), a)
        half = rounding.to_f16(a, mode).view(np.uint16) if result == "f16x2" else rounding.f32_to_bf16(a, mode)
        return half.astype(np.uint32)

    return lambda upper, lower: narrow(upper) << np.uint32(16) | narrow(lower)

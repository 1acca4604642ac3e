"""Rounding that IEEE 754 asks for and numpy does not have: one rounding of exact results, in any direction.

The tool is rounding to odd: an inexact result becomes the neighbour whose last bit is 1. A value rounded to odd with
two bits more than the target can be rounded again, in any mode, as if it were exact (Boldo and Melquiond 2008).
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

NAN32, NAN16, NAN_BF16 = 0x7FFFFFFF, 0x7FFF, 0x7FFF
MODES = ("rn", "rz", "rm", "rp")


def odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """float64 `value` + `error`, rounded to odd; `value` is the nearest to the sum, of `error` only the sign counts."""
    bits = value.view(np.int64)
    inexact = ((error > 0) | (error < 0)) & (bits & 1 == 0) & np.isfinite(value)
    if not inexact.any():
        return value
    away = (error > 0) == (value > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b in float64 and what it lost, exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float64, rounded to odd."""
    return odd(*two_sum(a, b))


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a * b in float64 and what it lost, exactly while nothing overflows or underflows (Dekker)."""
    p = a * b
    a1, b1 = a * 134217729.0, b * 134217729.0
    a1, b1 = a1 - (a1 - a), b1 - (b1 - b)
    a2, b2 = a - a1, b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def quotient_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b rounded to odd, for float64 values that fit float32."""
    q = a / b
    product, error = two_product(q, b)
    rest = (a - product) - error
    return odd(q, np.where(np.isfinite(q), np.where(b < 0, -rest, rest), 0.0))


def root_to_odd(a: np.ndarray) -> np.ndarray:
    """The square root rounded to odd, for float64 values that fit float32."""
    r = np.sqrt(a)
    product, error = two_product(r, r)
    return odd(r, np.where(np.isfinite(r), (a - product) - error, 0.0))


def to_f32(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float64, exact or rounded to odd, to float32 in a mode of MODES."""
    nearest = value.astype(np.float32)
    if mode == "rn":
        return nearest
    back = nearest.astype(np.float64)
    if mode == "rz":
        wrong = np.abs(back) > np.abs(value)
        toward = np.zeros_like(nearest)
    elif mode == "rm":
        wrong, toward = back > value, np.full_like(nearest, -np.inf)
    else:
        wrong, toward = back < value, np.full_like(nearest, np.inf)
    return np.where(wrong, np.nextafter(nearest, toward), nearest)


def odd_f32(value: np.ndarray) -> np.ndarray:
    """float64, exact or rounded to odd, to float32 rounded to odd."""
    toward_zero = to_f32(value, "rz")
    bits = toward_zero.view(np.uint32)
    inexact = (toward_zero.astype(np.float64) != value) & np.isfinite(value)
    return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)


def f32_to_bf16(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 (for one rounding: exact or rounded to odd) to bits of bfloat16; a NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    half = np.uint32(16)
    if mode == "rn":
        rounded = (bits + np.uint32(0x7FFF) + (bits >> half & np.uint32(1))) >> half
    elif mode == "rz":
        rounded = bits >> half
    else:
        up = (bits & np.uint32(0xFFFF) != 0) & ((value < 0) == (mode == "rm"))
        rounded = (bits >> half) + up
    result = rounded.astype(np.uint16)
    total = np.add.reduce(value, axis=None)
    if not np.isfinite(total):
        result = np.where(np.isnan(value), np.uint16(NAN_BF16), result)
    return result


def f64_to_bf16(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float64, exact or rounded to odd, to bits of bfloat16."""
    return f32_to_bf16(odd_f32(value), mode)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 (uint16) to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(value: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float32 or float64, exact or rounded to odd, to float16; a NaN becomes 0x7FFF."""
    result = value.astype(np.float16)
    if mode != "rn":
        result = _directed_f16(result, value, mode)
    return canonical(result)


def _directed_f16(nearest: np.ndarray, value: np.ndarray, mode: str) -> np.ndarray:
    back = nearest.astype(value.dtype)
    if mode == "rz":
        wrong, toward = np.abs(back) > np.abs(value), np.float16(0)
    elif mode == "rm":
        wrong, toward = back > value, np.float16(-np.inf)
    else:
        wrong, toward = back < value, np.float16(np.inf)
    return np.where(wrong, np.nextafter(nearest, toward), nearest)


def canonical(value: np.ndarray) -> np.ndarray:
    """float16, float32: every NaN becomes the one that the hardware makes, in place."""
    total = np.add.reduce(value, axis=None)
    if total == total and total - total == 0:
        return value
    nan = np.isnan(value)
    if nan.any():
        value = np.ascontiguousarray(value)
        size = value.dtype.itemsize
        if size < 8:
            value.view(f"u{size}")[nan] = NAN32 if size == 4 else NAN16
    return value


def flush(value: np.ndarray) -> np.ndarray:
    """Subnormal float32 to zero, the sign kept (.ftz)."""
    small = np.abs(value) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), value), value)


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float64, rounded once to nearest: by exact fractions, a lane at a time."""
    a, b, c = np.broadcast_arrays(a, b, c)
    plain = a * b + c
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    result = plain.copy()
    for i in np.flatnonzero(finite):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            result[i] = _nearest(exact)
    return result


def _nearest(exact: Fraction) -> float:
    """Python's own conversion rounds correctly; it refuses what overflows."""
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")

"""The two 8-bit floats, e4m3 (no infinities, one NaN) and e5m2 (a short float16), by tables of all their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from . import rounding
from .program import Instruction
from .registry import unsupported

Compute = Callable[..., np.ndarray]


@cache
def values(kind: str) -> np.ndarray:
    """(256,) float32: what each byte stands for; kind is "e4m3" or "e5m2"."""
    byte = np.arange(256, dtype=np.uint16)
    if kind == "e5m2":
        return (byte << np.uint16(8)).view(np.float16).astype(np.float32)
    exponent, mantissa = (byte >> 3 & 15).astype(int), (byte & 7).astype(np.float64)
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    magnitude[(byte & 0x7F) == 0x7F] = np.nan
    return np.where(byte & 0x80, -magnitude, magnitude).astype(np.float32)


def encode(value: np.ndarray, kind: str) -> np.ndarray:
    """Float32 or float64 to bytes (uint8), nearest with ties to even, clamped to the largest finite (.satfinite)."""
    last = 0x7E if kind == "e4m3" else 0x7B
    table = values(kind)[: last + 1].astype(np.float64)
    magnitude = np.abs(value.astype(np.float64))
    middles = (table[1:] + table[:-1]) / 2
    low = np.searchsorted(middles, magnitude, side="left")
    tie = (low < last) & (magnitude == middles[np.minimum(low, last - 1)])
    # On a tie the even code.
    code = np.where(tie, low + (low & 1), low)
    nan = 0x7F
    code = np.where(np.isnan(value), nan, code)
    sign = np.where(np.isnan(value), 0, np.signbit(value) * 0x80)
    return (code | sign).astype(np.uint8)


def packing(instruction: Instruction, result: str, mods: set[str]) -> Compute:
    """Two float32 to two bytes, the first source in the upper one."""
    kind = result[:4]
    if "satfinite" not in mods:
        raise unsupported(instruction, "8-bit floats are made with .satfinite")

    def narrow(a: np.ndarray) -> np.ndarray:
        return encode(np.where(a < 0, np.float32(0), a) if "relu" in mods else a, kind).astype(np.uint16)

    return lambda upper, lower: narrow(upper) << np.uint16(8) | narrow(lower)


def between(instruction: Instruction, result: str, kind: str, mods: set[str]) -> Compute:
    """Two bytes to two float16, and back."""
    if result == "f16x2" and kind in ("e4m3x2", "e5m2x2"):
        table = values(kind[:4])

        def widen(a: np.ndarray) -> np.ndarray:
            pairs = np.ascontiguousarray(a).view(np.uint8).reshape(-1, 2)
            return rounding.to_f16(table[pairs]).view(np.uint32)[:, 0]

        return widen
    if kind == "f16x2" and result in ("e4m3x2", "e5m2x2") and "satfinite" in mods:

        def narrow(a: np.ndarray) -> np.ndarray:
            return encode(np.ascontiguousarray(a).view(np.float16).reshape(-1, 2), result[:4]).view(np.uint16)[:, 0]

        return narrow
    raise unsupported(instruction, "that conversion of 8-bit floats")

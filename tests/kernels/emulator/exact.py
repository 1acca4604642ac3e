"""Rounding by exact fractions: the oracle of the floating-point tests."""

import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    """A binary float: bits of its significand (with the hidden one) and its largest exponent."""

    precision: int
    largest: int
    bits: int

    @property
    def smallest(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.largest


F16, BF16, F32, F64 = Format(11, 15, 16), Format(8, 127, 16), Format(24, 127, 32), Format(53, 1023, 64)
TF32 = Format(11, 127, 32)


def round_fraction(value: Fraction, target: Format, mode: str = "rn") -> Fraction | float:
    """The float of a format for an exact value; an infinity as a Python float. Zero is Fraction(0), without a sign.

    mode: rn (to nearest, ties to even), rna (ties away), rz, rm (down), rp (up).
    """
    if value == 0:
        return Fraction(0)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, target.smallest) - target.precision + 1)
    steps = size / unit
    low = math.floor(steps)
    rest = steps - low
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": value < 0 and rest > 0,
        "rp": value > 0 and rest > 0,
    }[mode]
    rounded = (low + up) * unit
    limit = (2 - Fraction(2) ** (1 - target.precision)) * Fraction(2) ** target.largest
    if rounded > limit:
        grows = mode in ("rn", "rna") or mode == ("rm" if value < 0 else "rp")
        if not grows:
            return limit if value > 0 else -limit
        return math.inf if value > 0 else -math.inf
    return rounded if value > 0 else -rounded


def to_bits(value: Fraction | float, target: Format, negative_zero: bool = False) -> int:
    """The bits of a value that the format has."""
    sign = value < 0 or (value == 0 and negative_zero)
    top = target.bits - 1
    exponent_bits = (2 * target.largest + 1).bit_length()
    fraction_bits = top - exponent_bits
    if isinstance(value, float):
        assert math.isinf(value)
        return sign << top | (2 * target.largest + 1) << fraction_bits
    size = abs(value)
    if size == 0:
        return sign << top
    exponent = max(math.floor(math.log2(size)) - 1, target.smallest)
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    significand = size / Fraction(2) ** (exponent - fraction_bits)
    assert significand.denominator == 1, (value, target)
    whole = int(significand)
    hidden = 1 << fraction_bits
    biased = exponent + target.largest if whole >= hidden else 0
    return sign << top | biased << fraction_bits | whole & (hidden - 1)


def from_bits(bits: int, source: Format) -> Fraction | float:
    """A format's bits to an exact value, or to a Python float for infinities and NaN."""
    if source.bits == 32:
        value = struct.unpack("<f", struct.pack("<I", bits))[0]
    elif source is F16:
        value = float(np.uint16(bits).view(np.float16))
    elif source is BF16:
        value = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    else:
        value = struct.unpack("<d", struct.pack("<Q", bits))[0]
    return Fraction(value) if math.isfinite(value) else value


def root(value: Fraction, target: Format, mode: str) -> Fraction | float:
    """The square root, rounded: exact to many more bits than the format has, with a sticky one."""
    scale = 2 ** (2 * 400)
    whole = math.isqrt(value.numerator * scale * value.denominator)
    exact = whole * whole == value.numerator * scale * value.denominator
    near = Fraction(whole * 2 + (not exact), 2 * value.denominator * 2**400)
    return round_fraction(near, target, mode)

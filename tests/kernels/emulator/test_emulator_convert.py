"""cvt against exact fractions and Python's integers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from exact import BF16, F16, F32, F64, TF32, Format, from_bits, round_fraction, to_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ptx_harness import evaluate

from minipeft_kernels.emulator.float8 import values as float8_values
from minipeft_kernels.emulator.rounding import f64_to_bf16

FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
MANTISSAS = [0, 1, 0x1000, 0xFFF, 0x1FFF, 0x8000, 0x7FFF, 0xFFFF, 0x18000, 0x7FFFFF]
near_ties = st.builds(
    lambda e, m, s: s << 31 | e << 23 | m, st.integers(0, 254), st.sampled_from(MANTISSAS), st.integers(0, 1)
)
any_f32 = st.integers(0, 2**32 - 1) | near_ties
# Drawn as such: filtering would throw most draws away.
normal_f32 = st.builds(
    lambda e, m, s: s << 31 | e << 23 | m,
    *(st.integers(1, 254), st.sampled_from(MANTISSAS) | st.integers(0, (1 << 23) - 1), st.integers(0, 1)),
)


def convert(name: str, bits: list[int], source: str, result: str) -> list[int]:
    return evaluate(f"cvt.{name} y, a;", {"a": np.array(bits, source)}, {"y": result})["y"].tolist()


def is_nan(value: Fraction | float) -> bool:
    return isinstance(value, float) and math.isnan(value)


@pytest.mark.parametrize("target", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
@settings(max_examples=25, deadline=None)
@given(bits=st.lists(any_f32, min_size=1, max_size=32))
def test_narrowing_rounds_once(target: str, mode: str, bits: list[int]) -> None:
    for b, got in zip(bits, convert(f"{mode}.{target}.f32", bits, "u4", "u2"), strict=True):
        value = from_bits(b, F32)
        if is_nan(value):
            assert got == 0x7FFF
        else:
            rounded = value if isinstance(value, float) else round_fraction(value, FORMATS[target], mode)
            assert got == to_bits(rounded, FORMATS[target], negative_zero=bool(b >> 31))


near_ties_f64 = st.builds(
    lambda e, m, rest: math.ldexp(1 + m * 2.0**-8 + rest, e),
    *(st.integers(-100, 100), st.integers(0, 255), st.sampled_from([-(2.0**-40), 2.0**-40, 0.0, 2.0**-9])),
)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(near_ties_f64, min_size=1, max_size=32))
@example(values=[1 + 2.0**-8 + 2.0**-40])
def test_a_result_in_float64_is_rounded_to_bfloat16_once(values: list[float]) -> None:
    """A first rounding to float32 that forgot what it cut off would make a tie of it."""
    for value, got in zip(values, f64_to_bf16(np.array(values)).tolist(), strict=True):
        assert got == to_bits(round_fraction(Fraction(value), BF16, "rn"), BF16)


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(any_f32, any_f32), min_size=1, max_size=16))
def test_packing_puts_the_first_source_in_the_upper_half(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(c, "u4") for c in zip(*pairs, strict=True))
    body = "cvt.rn.bf16x2.f32 y, a, b; cvt.rn.bf16.f32 u, a; cvt.rn.bf16.f32 l, b;"
    found = evaluate(body, {"a": a, "b": b}, {"y": "u4", "u": "u2", "l": "u2"})
    np.testing.assert_array_equal(found["y"], found["u"].astype("u4") << np.uint32(16) | found["l"])


@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_widening_is_exact_for_every_value(source: str) -> None:
    bits = [b for b in range(0, 1 << 16, 37) if not is_nan(from_bits(b, FORMATS[source]))]
    for b, got in zip(bits, convert(f"f32.{source}", bits, "u2", "u4"), strict=True):
        value = from_bits(b, FORMATS[source])
        assert got == to_bits(value, F32, negative_zero=bool(b >> 15))


@pytest.mark.parametrize(("name", "mode"), [("rna.tf32.f32", "rna"), ("rn.tf32.f32", "rn")])
@settings(max_examples=25, deadline=None)
@given(bits=st.lists(normal_f32, min_size=1, max_size=32))
def test_tf32_keeps_ten_bits_of_mantissa(name: str, mode: str, bits: list[int]) -> None:
    for b, got in zip(bits, convert(name, bits, "u4", "u4"), strict=True):
        assert got == to_bits(round_fraction(from_bits(b, F32), TF32, mode), F32)


INTEGER_MODES = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("kind", ["s32", "u32", "s16", "u8", "s64", "u64"])
@pytest.mark.parametrize("mode", INTEGER_MODES)
@settings(max_examples=8, deadline=None)
@example(data=[0x4F000000, 0xCF000000, 0x4EFFFFFF, 0x5F000000, 0xDF000001, 0x7FC00000, 0x7F800000, 0xFF800000])
@given(data=st.lists(any_f32, min_size=1, max_size=32))
def test_floats_become_integers_clamped(kind: str, mode: str, data: list[int]) -> None:
    width = int(kind[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    dtype = f"{'i' if kind[0] == 's' else 'u'}{max(width // 8, 2)}"
    for b, got in zip(data, convert(f"{mode}.{kind}.f32", data, "u4", dtype), strict=True):
        value = from_bits(b, F32)
        if is_nan(value):
            expected = (low if kind == "s64" else 1 << 63) if width == 64 else 0
        elif isinstance(value, float):
            expected = high if value > 0 else low
        else:
            expected = min(high, max(low, INTEGER_MODES[mode](value)))
        assert got == expected, (hex(b), got, expected)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize(
    ("target", "mode"), [("f32", "rn"), ("f32", "rz"), ("f32", "rp"), ("f32", "rm"), ("f16", "rn")]
)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_integers_become_floats_rounded_once(kind: str, target: str, mode: str, data: st.DataObject) -> None:
    width = int(kind[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    near = st.builds(lambda e, d: max(low, min(high, (1 << e) + d)), st.integers(0, width), st.integers(-3, 3))
    numbers = data.draw(st.lists(st.integers(low, high) | near, min_size=1, max_size=32))
    dtype = f"{'i' if kind[0] == 's' else 'u'}{width // 8}"
    form: Format = FORMATS[target]
    for n, got in zip(numbers, convert(f"{mode}.{target}.{kind}", numbers, dtype, f"u{form.bits // 8}"), strict=True):
        assert got == to_bits(round_fraction(Fraction(n), form, mode), form), n


@pytest.mark.parametrize(("name", "expected"), [("u32.u16", 0xFFFE), ("s32.s16", -2), ("s32.s8", -2), ("u32.u8", 0xFE)])
def test_integers_widen_by_their_sign(name: str, expected: int) -> None:
    assert convert(name, [0xFFFE], "u2", "i4") == [expected]


@pytest.mark.parametrize(("name", "expected"), [("sat.u8.s32", [0, 255, 7]), ("sat.s16.s32", [-32768, 300, 7])])
def test_sat_clamps_integers(name: str, expected: list[int]) -> None:
    assert convert(name, [-70000, 300, 7], "i4", "i2") == expected


def test_whole_numbers_stay_floats() -> None:
    x = np.array([-2.5, -0.5, 0.5, 1.5, 2.7, math.inf], "f4")
    names = {"y": "rni", "z": "rmi", "w": "rpi", "v": "rzi"}
    body = " ".join(f"cvt.{m}.f32.f32 {n}, a;" for n, m in names.items())
    found = evaluate(body, {"a": x.view("u4")}, dict.fromkeys(names, "u4"))
    for name, function in (("y", np.rint), ("z", np.floor), ("w", np.ceil), ("v", np.trunc)):
        np.testing.assert_array_equal(found[name].view("f4"), function(x))


# Largest finite value, smallest normal one and the smallest of all, from the formats' definition (OCP 2023).
@pytest.mark.parametrize(
    ("kind", "facts"), [("e4m3", (448.0, 2.0**-6, 2.0**-9)), ("e5m2", (57344.0, 2.0**-14, 2.0**-16))]
)
def test_the_tables_of_eight_bit_floats(kind: str, facts: tuple[float, float, float]) -> None:
    finite = float8_values(kind)[:128][np.isfinite(float8_values(kind)[:128])]
    mantissa = int(kind[-1])
    assert (finite.max(), finite[1 << mantissa], finite[1]) == facts
    assert (np.diff(finite) > 0).all()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@settings(max_examples=25, deadline=None)
@given(numbers=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=32))
def test_eight_bit_floats_are_the_nearest_with_ties_to_even(kind: str, numbers: list[float]) -> None:
    table = {b: Fraction(float(v)) for b, v in enumerate(float8_values(kind)[:128]) if np.isfinite(v)}
    a = np.array(numbers, "f4").view("u4")
    found = evaluate(f"cvt.rn.satfinite.{kind}x2.f32 y, a, a;", {"a": a}, {"y": "u2"})["y"]
    for number, got in zip(numbers, found.tolist(), strict=True):
        size = Fraction(min(abs(number), 1e6))
        code = min(table, key=lambda b: (abs(table[b] - size), b % 2))
        expected = code | (0x80 if math.copysign(1, number) < 0 else 0)
        assert got == expected | expected << 8


def test_eight_bit_floats_widen_by_their_table() -> None:
    bytes_ = np.arange(0, 1 << 16, 257, dtype="u2")
    found = evaluate("cvt.rn.f16x2.e5m2x2 y, a;", {"a": bytes_}, {"y": "u4"})["y"]
    halves = (bytes_ & 0xFF).astype("u2") << np.uint16(8)
    kept = ~np.isnan(halves.view("f2"))
    np.testing.assert_array_equal((found & 0xFFFF)[kept], halves[kept])

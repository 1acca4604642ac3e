"""Floors against figures worked out by hand."""

import pytest

from minipeft_kernels.lab.roofline import GPUS, budget, floor, product_bytes, resident_warps, weight_bytes

A100 = next(g for g in GPUS if g.name.startswith("A100"))
H100 = next(g for g in GPUS if g.name.startswith("H100"))
SQUARE = ("square", 4096, 4096)


def test_a_doubly_quantized_weight_takes_4_127_bits() -> None:
    assert 8 * weight_bytes(4096, 4096) / 4096**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert 8 * weight_bytes(4096, 4096, double=False) / 4096**2 == pytest.approx(4.5)


@pytest.mark.parametrize(("gpu", "m", "packed", "dense"), [(A100, 1, 4.3, 16.5), (H100, 1, 2.6, 10.0)])
def test_one_row_takes_as_long_as_reading_the_weight(gpu: object, m: int, packed: float, dense: float) -> None:
    found = floor(gpu, SQUARE, m, per_weight=0, integer=0)
    assert found.floor == pytest.approx(packed, abs=0.1)
    assert found.dense_memory == pytest.approx(dense, abs=0.1)


def test_many_rows_take_as_long_as_their_arithmetic() -> None:
    found = floor(A100, SQUARE, 2048, per_weight=5, integer=2)
    assert found.floor == found.tensor == pytest.approx(220, abs=1)


def test_the_budget_is_where_issue_takes_as_long_as_memory() -> None:
    limit = budget(A100)
    assert limit == pytest.approx(4.9, abs=0.1)
    found = floor(A100, SQUARE, 1, per_weight=limit, integer=limit / 2)
    reading = weight_bytes(4096, 4096) / A100.bandwidth / 1e3
    assert found.issue == pytest.approx(reading) and found.integer == pytest.approx(reading)


def test_partial_sums_are_written_and_read() -> None:
    assert product_bytes(2, 100, 64, split=4) - product_bytes(2, 100, 64) == 2 * 4 * 4 * 2 * 100


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [(32, 0, 4, 64), (128, 0, 4, 16), (255, 0, 4, 8), (32, 100 << 10, 4, 4), (129, 0, 1, 12)],
)
def test_registers_and_shared_memory_limit_the_warps(registers: int, shared: int, warps: int, resident: int) -> None:
    assert resident_warps(80, registers, shared, warps) == resident

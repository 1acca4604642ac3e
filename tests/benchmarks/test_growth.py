"""Slopes are those of the powers that the times were made from."""

import pytest

from benchmarks.growth import PART, families, plot, slope, summary
from benchmarks.harness import OURS, Row


def rows_of(variant: str, candidate: str, times: dict[int, float]) -> list[Row]:
    return [
        Row("finetune_growth", variant, str(number), "float32", candidate, "right", median=time)
        for number, time in times.items()
    ]


LINEAR = {64: 6.4, 128: 12.8, 256: 25.6}
SQUARE = {number: (number / 64) ** 2 for number in LINEAR}
ROWS = [
    *rows_of("step", OURS, {number: LINEAR[number] + SQUARE[number] for number in LINEAR}),
    *rows_of("step", PART, SQUARE),
    *rows_of("load", OURS, {2: 5.0, 4: 5.0}),
    *rows_of("alone", OURS, {8: 5.0}),
]


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_slope_of_a_power_is_its_exponent(power: float) -> None:
    assert slope([(x, 3.0 * x**power) for x in (2.0, 3.0, 8.0, 64.0)]) == pytest.approx(power)


def test_a_part_that_was_measured_beside_is_taken_out() -> None:
    found = families(ROWS)
    assert list(found) == ["step", f"step less {PART}", "load"], "a single case has no slope"
    assert dict(found[f"step less {PART}"]) == pytest.approx(LINEAR)


def test_the_summary_says_the_slope_of_all_and_of_the_end() -> None:
    said = summary(ROWS)
    assert said["slope of load"] == "0.00 from 2 to 4, 0.00 at the end"
    assert said[f"slope of step less {PART}"] == "1.00 from 64 to 256, 1.00 at the end"
    # log4(41.6 / 7.4) and log2(41.6 / 16.8)
    assert said["slope of step"] == "1.25 from 64 to 256, 1.31 at the end"


@pytest.mark.parametrize("rows", [ROWS, []])
def test_growth_is_drawn(tmp_path, rows: list[Row]) -> None:
    plot(tmp_path / "a.png", rows, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

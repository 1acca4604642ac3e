"""The harness: nothing wrong is timed, all take turns, and the numbers are what the clock said."""

import math

import pytest
import torch
from fake_device import FakeDevice

from benchmarks import harness
from benchmarks.harness import OURS, Candidate, Case, Missing, Work, distance, interleave, measure, quantile
from benchmarks.limits import Roofline
from benchmarks.reference import near

LIMITS = Roofline(1e9, "given", {torch.float32: 1e9})
ONES = near(lambda: torch.ones(2))


def case(*candidates):
    return Case("op", "forward", "2", "float32", candidates)


def candidate(name, run, error=ONES, work=None):
    return Candidate(name, lambda: run, error, 1e-6, work or Work(500, 1000))


def test_a_wrong_result_shows_no_speed():
    device = FakeDevice()
    calls = []

    def wrong():
        calls.append(1)
        return torch.tensor([1.0, 1.1])

    rows = measure(case(candidate(OURS, wrong), candidate("peer", device.call("peer", 1.0))), device, LIMITS)
    assert rows[0].status == "wrong" and "not timed" in rows[0].note and rows[0].error == pytest.approx(0.1)
    assert rows[0].median is rows[0].q20 is rows[0].gb_per_s is rows[0].share is None
    assert len(calls) == 1
    assert rows[1].status == "right" and rows[1].median == 1e6 and rows[1].ratio is None


@pytest.mark.parametrize(
    "result", [torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf]), torch.ones(1), torch.ones(2, 1), None]
)
def test_what_is_not_finite_or_has_another_shape_is_wrong(result):
    (row,) = measure(case(candidate(OURS, lambda: result)), FakeDevice(), LIMITS)
    assert row.status == "wrong" and row.median is None


def test_an_error_that_is_not_a_number_is_wrong():
    (row,) = measure(case(candidate(OURS, lambda: 0, error=lambda _: math.nan)), FakeDevice(), LIMITS)
    assert row.status == "wrong"


def test_what_raises_is_reported_and_the_others_go_on():
    device = FakeDevice()

    def broken():
        raise RuntimeError("no kernel\nfor this GPU")

    cannot_start = Candidate("starts", broken, ONES, 1e-6, Work(1))
    right = candidate("right", device.call("right", 2))
    rows = measure(case(candidate(OURS, broken), cannot_start, Missing("absent", "why"), right), device, LIMITS)
    assert [row.status for row in rows] == ["failed", "failed", "missing", "right"]
    assert rows[0].note == rows[1].note == "RuntimeError: no kernel for this GPU"
    assert rows[2].note == "why"


def test_what_raises_while_timed_loses_its_speed():
    device, runs = FakeDevice(), iter(range(100))

    def breaks():
        if next(runs) == 3:
            raise RuntimeError("out of memory")
        return torch.ones(2)

    (row,) = measure(case(candidate(OURS, breaks)), device, LIMITS)
    assert row.status == "failed" and "while timing" in row.note and row.median is None


def test_candidates_take_turns_with_empty_caches():
    device = FakeDevice()
    runs = [device.call(name, 1.0) for name in "ABC"]
    interleave(runs, device, rounds=2)
    assert device.events == ["flush", "A", "flush", "B", "flush", "C"] * 2


def test_emptying_caches_is_not_timed():
    device = FakeDevice()
    times = interleave([device.call("A", 1.0, 2.0), device.call("B", 3.0)], device, rounds=2)
    assert times == [[1.0, 2.0], [3.0, 3.0]]


def test_warm_up_is_not_timed():
    device = FakeDevice()
    (times,) = interleave([device.call("A", 50.0, 1.0)], device)
    assert set(times) == {1.0} and harness.MIN_ROUNDS <= len(times) <= harness.MAX_ROUNDS


def test_quick_is_one_call():
    device = FakeDevice()
    (row,) = measure(case(candidate(OURS, device.call("A", 1.0))), device, LIMITS, quick=True)
    assert row.rounds == 1 and device.events == ["A", "flush", "A"]


def test_the_ratio_is_of_each_round(monkeypatch):
    monkeypatch.setattr(harness, "MIN_ROUNDS", 3)
    monkeypatch.setattr(harness, "MAX_ROUNDS", 3)
    device = FakeDevice()
    # Checked, warmed up, then three rounds, of which the second and third meet a busier machine each.
    ours = candidate(OURS, device.call("A", 9, 9, 1.0, 10.0, 30.0))
    peer = candidate("peer", device.call("B", 9, 9, 2.0, 20.0, 30.0))
    rows = measure(case(ours, peer), device, LIMITS)
    assert rows[0].ratio is None and rows[0].median == 10e6
    assert rows[1].ratio == 0.5 and rows[1].ratio_q20 == 0.5 and rows[1].ratio_q80 == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("work", "floor"), [(Work(500, 1000), 1e6), (Work(2000, 1000), 2e6), (Work(500), 5e5), (Work(0, 3000), 3e6)]
)
def test_rates_and_share_follow_from_bytes_and_operations(work, floor):
    device = FakeDevice()
    limits = Roofline(1e3, "given", {torch.float32: 1e3})
    (row,) = measure(case(candidate(OURS, device.call("A", 4.0), work=work)), device, limits, quick=True)
    assert row.floor == floor and row.share == floor / 4e6
    assert row.gb_per_s == work.nbytes / 4e9 and row.gflop_per_s == (work.flops / 4e9 if work.flops else None)


def test_an_unknown_arithmetic_limit_leaves_that_of_bandwidth():
    assert Roofline(1e3, "given").floor_seconds(500, 10**9, torch.float32) == 0.5


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([3.0], 0.2, 3.0), ([1, 2, 3, 4, 5, 6], 0.2, 2.0), ([6, 5, 4, 3, 2, 1], 0.8, 5.0), ([0.0, 1.0], 0.2, 0.2)],
)
def test_quantiles_are_between_the_nearest_values(values, q, expected):
    assert quantile(values, q) == pytest.approx(expected)
    assert quantile(values, q) == pytest.approx(float(torch.tensor(values, dtype=torch.float64).quantile(q)))


def test_distance_is_in_units_of_the_right_result():
    right = torch.tensor([3.0, -3.0])
    assert distance(right.to(torch.bfloat16), right) == 0
    assert distance(torch.tensor([3.0, -2.7]), right) == pytest.approx(0.1)
    assert distance([right, right + 3], [right, right]) == 1
    assert distance([right], [right, right]) == math.inf
    assert distance(torch.zeros(2), torch.zeros(2)) == 0 and distance(right, torch.zeros(2)) == math.inf
    assert distance(torch.empty(0), torch.empty(0)) == 0

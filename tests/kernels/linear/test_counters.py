"""Whose counters a launch gets: nobody's who may run at the same time."""

import pytest
import torch

from minipeft_kernels.linear import counters
from minipeft_kernels.linear.counters import COUNT, Counters

CPU = torch.device("cpu")


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    first, second = (range(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (a, b))
    return first.start < second.stop and second.start < first.stop


def test_launches_of_one_stream_share_and_those_of_two_do_not() -> None:
    held = Counters(CPU)
    one, other = held.of(1, 8), held.of(2, 8)
    assert held.of(1, COUNT) is one and not overlap(one, other)
    more = held.of(1, COUNT + 1)
    assert more.numel() > COUNT and held.of(1, 8) is more and not more.any()


def test_each_captured_graph_has_its_own_whatever_is_launched_between() -> None:
    held = Counters(CPU)
    stream = held.of(7, 8)
    first = held.captured(7, 1, 8)
    assert held.captured(7, 1, 64) is first  # of one stream in one graph they follow each other
    beside = held.captured(8, 1, 8)  # a branch of the same graph may run beside it
    assert held.of(7, 8) is stream
    second = held.captured(7, 2, 8)
    taken = [stream, first, beside, second, held.captured(7, 1, 8)]
    assert not any(overlap(a, b) for i, a in enumerate(taken) for b in taken[:i])
    assert all(t.dtype == torch.int32 and not t.any() for t in taken)


def test_where_there_is_no_supply_each_graph_gets_zeros_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """None was made before, it is used up, or it is too small; where no number tells the capture, each launch does."""
    monkeypatch.setattr(counters, "GRAPHS", 1)
    held = Counters(CPU)
    first = held.captured(7, 1, 8)
    assert held.captured(7, 1, COUNT) is first
    held.of(7, 8)
    assert held.captured(7, 2, COUNT + 1).numel() == COUNT + 1
    assert held.captured(7, None, 8) is not held.captured(7, None, 8)
    last = held.captured(7, 3, 8)
    used_up = held.captured(7, 4, 8)
    assert held.captured(7, 4, 8) is used_up and not overlap(used_up, last) and not used_up.any()

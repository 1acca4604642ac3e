"""Pages are where they are needed, as they were left, at the fewest moves, within every tier's slots."""

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.optim import PagingError
from minipeft.optim.pager import MOVERS, Pager
from minipeft.optim.tiers import MemoryTier, SimulatedDevice, Tier

SIZE = 64


class Store(Tier):
    """Stands for the disk: keeps copies, and checks that nothing is read that was not written."""

    def __init__(self, slots):
        super().__init__("disk", slots, SIZE)
        self._content = {}

    def put(self, slot, page, buffer):
        self._content[slot] = (page, buffer.clone())

    def get(self, slot, page, buffer):
        written, content = self._content.pop(slot)
        assert written == page
        buffer.copy_(content)


def stack(pages, device=None, host=None, **device_settings):
    """A pager of so many pages and slots; None: no such tier, or no limit."""
    tiers = []
    if device is not None:
        tiers.append(SimulatedDevice("device", min(device, pages), SIZE, **device_settings))
    first = tiers[0].slots if tiers else 0
    whole = pages - first + (MOVERS + 1 if tiers else 0)
    tiers.append(MemoryTier("host", min(host or whole, whole), SIZE))
    tiers.append(Store(pages))
    pager = Pager(tiers)
    pager.grow(pages)
    return pager


def use(pager, page, value):
    """Write `value` into a page; returns what was there."""
    with pager.use(page) as buffer:
        before = buffer.view(torch.int64).tolist()
        buffer.view(torch.int64).fill_(value)
    assert len(set(before)) == 1
    return before[0]


def sweep(pager, order, next_order, values, ahead=1 << 60, skip=()):
    pager.begin_sweep(order, next_order, ahead)
    for page in order:
        if page not in skip:
            assert use(pager, page, values.get(page, 0) + 1) == values.get(page, 0)
            values[page] = values.get(page, 0) + 1


@pytest.mark.parametrize(
    ("device", "host"), [(None, 2), (None, 5), (None, 11), (2, None), (7, None), (2, 2), (3, 4), (4, 20)]
)
def test_alternating_sweeps_move_no_more_than_must(device, host):
    pages = 12
    pager, values = stack(pages, device, host), {}
    order = list(range(pages))
    for number in range(6):
        sweep(pager, order, order[::-1], values)
        order.reverse()
        if number == 1:
            # Not the first: it makes the pages.
            before = (pager.stats.page_ins, pager.stats.page_outs)
    first = pager.tiers[0].slots
    # Every page is used once a sweep, so all but those that the first tier can keep must come, and as many must go.
    assert pager.stats.page_ins - before[0] == 4 * (pages - first)
    assert pager.stats.page_outs - before[1] == 4 * (pages - first)
    pager.close()


@pytest.mark.parametrize("slots", [4, 6, 9])
def test_sweeps_in_one_direction_keep_what_comes_first(slots):
    pages = 12
    pager, values, ahead = stack(pages, host=slots), {}, 2
    order = list(range(pages))
    for number in range(8):
        sweep(pager, order, order, values, ahead)
        if number == 1:
            before = pager.stats.page_ins
    # Least-recently-used would bring all 12 every time.
    assert (pager.stats.page_ins - before) / 6 <= pages - slots + ahead + 1
    pager.close()


def test_nothing_moves_when_all_fits():
    pager, values = stack(8, host=8), {}
    for _ in range(3):
        sweep(pager, list(range(8)), list(range(8)), values)
    assert pager.stats.bytes_in == pager.stats.bytes_out == 0 and not pager._threads
    assert pager.bytes_by_tier()["host"] == {"bytes": 512, "peak_bytes": 512, "budget_bytes": 512}
    pager.close()


@settings(max_examples=60, deadline=None)
@given(
    pages=st.integers(1, 12),
    device=st.none() | st.integers(2, 14),
    host=st.none() | st.integers(2, 14),
    data=st.data(),
)
def test_pages_keep_their_content_whatever_the_order(pages, device, host, data):
    """Also when the order is not the one announced, and pages are used several times or not at all."""
    over = []

    def watch(direction, page):
        over.extend(tier.name for tier in pager.tiers if tier.used > tier.slots)

    settings = {"on_copy": watch} if device else {}
    pager, values = stack(pages, device, host, **settings), {}
    some_pages = st.lists(st.integers(0, pages - 1), max_size=20)
    for _ in range(3):
        announced = data.draw(some_pages)
        pager.begin_sweep(announced, data.draw(some_pages), data.draw(st.sampled_from([1, 3, 1 << 60])))
        for page in data.draw(st.one_of(st.just(announced), some_pages)):
            assert use(pager, page, values.get(page, 0) + 1) == values.get(page, 0)
            values[page] = values.get(page, 0) + 1
    assert not over
    assert all(tier.peak <= tier.slots for tier in pager.tiers)
    pager.close()


def test_copies_and_arithmetic_overlap():
    # Out of the device and not yet on the way back.
    away, changed = set(), threading.Condition()

    def note(direction, page):
        with changed:
            (away.add if direction == "get" else away.discard)(page)
            changed.notify_all()

    pages = 12
    pager, order = stack(pages, device=6, on_copy=note), list(range(pages))
    for _ in range(4):
        pager.begin_sweep(order, order[::-1])
        for page, following in itertools.pairwise([*order, order[-1]]):
            with pager.use(page) as buffer, changed:
                buffer[0] += 1
                # The next page comes while this one is computed with.
                assert changed.wait_for(lambda: following not in away, timeout=60)  # noqa: B023
        order.reverse()
    assert pager.stats.page_ins >= 3 * (pages - 6)
    pager.close()


def test_a_copy_is_asked_for_while_one_is_under_way_in_either_direction():
    """So that the bus need not wait until a thread has woken: each copy ends only when two others have begun."""
    under_way, together, changed = [], [], threading.Condition()

    def copy(direction, page):
        with changed:
            under_way.append(page)
            if len(under_way) == 3:
                together.append(tuple(under_way))
            changed.notify_all()
            changed.wait_for(lambda: together, timeout=5)
            under_way.remove(page)

    pages = 24
    pager, order = stack(pages, device=8, on_copy=copy), list(range(pages))
    for _ in range(3):
        pager.begin_sweep(order, order[::-1])
        for page in order:
            use(pager, page, 1)
        order.reverse()
    assert together
    pager.close()


@pytest.mark.parametrize("direction", ["get", "put"])
def test_a_failed_copy_is_an_error_at_once_and_ever_after(direction):
    def fail(now, page):
        if now == direction and page == 3:
            raise OSError("the link is down")

    pager, values, order = stack(6, device=2, on_copy=fail), {}, list(range(6))
    with pytest.raises(PagingError, match=r"incomplete.*the link is down.*checkpoint"):
        for _ in range(3):
            sweep(pager, order, order[::-1], values)
            order.reverse()
    with pytest.raises(PagingError, match="the link is down"):
        pager.begin_sweep(order, order)
    pager.close()
    assert not any(thread.is_alive() for thread in pager._threads)


def test_movers_end_with_the_pager():
    pager, values = stack(6, host=2), {}
    sweep(pager, list(range(6)), list(range(6)), values)
    threads = list(pager._threads)
    assert len(threads) == MOVERS and all(thread.daemon for thread in threads)
    pager.close()
    assert not any(thread.is_alive() for thread in threads)


def test_a_trace_tells_where_every_page_is():
    pager, values, order = stack(8, device=3, host=4), {}, list(range(8))
    pager.trace(True)
    for _ in range(3):
        sweep(pager, order, order[::-1], values)
        order.reverse()
    places = {}
    for _, event, page, tier in pager.stats.trace:
        if event == "used":
            assert places[page] == "device"
        places[page] = tier
        assert sum(place == "device" for place in places.values()) <= 3
        assert sum(place == "host" for place in places.values()) <= 4
    pager.close()

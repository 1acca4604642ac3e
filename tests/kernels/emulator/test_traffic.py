"""Sectors and wavefronts, against accesses that can be counted by hand and against counting one lane at a time."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft_kernels.emulator.traffic import sectors, wavefronts

LANES = np.arange(32)
ALL = np.ones((1, 32), np.bool_)


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    [
        # Neighbours: 128 bytes are 4 sectors, 512 are 16.
        (1, 4, (4, 4)),
        (1, 16, (16, 16)),
        (1, 2, (2, 2)),
        (1, 1, (1, 1)),
        # Every second word: twice the sectors for the same 128 bytes.
        (2, 4, (8, 4)),
        # From 8 words on, a sector a lane.
        (8, 4, (32, 4)),
        (32, 4, (32, 4)),
        # All the same word: one sector, of which 4 bytes are asked for.
        (0, 4, (1, 1)),
        (0, 16, (1, 1)),
    ],
)
def test_sectors_of_a_strided_access(stride: int, size: int, expected: tuple[int, int]) -> None:
    assert sectors(1 << 20 | (LANES * stride * size)[None], size, ALL) == expected


def test_an_access_that_starts_inside_a_sector_touches_one_more() -> None:
    assert sectors((LANES * 4 + 16)[None], 4, ALL) == (5, 4)


def test_lanes_that_do_not_take_part_cost_nothing() -> None:
    active = ALL.copy()
    active[0, 8:] = False
    assert sectors((LANES * 4)[None], 4, active) == (1, 1)
    assert sectors((LANES * 4)[None], 4, ~ALL) == (0, 0)
    assert wavefronts((LANES * 128)[None], 4, active) == (8, 1)
    assert wavefronts((LANES * 4)[None], 4, ~ALL) == (0, 0)


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    [
        # In words of 4 bytes: all banks once.
        (1, 4, (1, 1)),
        (2, 4, (2, 1)),
        (32, 4, (32, 1)),
        (33, 4, (1, 1)),
        (0, 4, (1, 1)),
        # Bytes: four lanes share a word, a quarter of the banks works.
        (0.25, 1, (1, 1)),
        # 8 bytes a lane go by half warps, 16 by quarters.
        (2, 8, (2, 2)),
        (4, 16, (4, 4)),
        # Rows of 128 bytes: each lane of a quarter meets the same four banks.
        (32, 16, (32, 4)),
        # Padded by 16 bytes they do not.
        (36, 16, (4, 4)),
    ],
)
def test_wavefronts_of_a_strided_access(stride: float, size: int, expected: tuple[int, int]) -> None:
    assert wavefronts((LANES * stride * 4).astype(np.int64)[None], size, ALL) == expected


def _sectors_by_hand(addresses: list[int], size: int) -> tuple[int, int]:
    touched = {byte // 32 for a in addresses for byte in range(a, a + size)}
    asked = {byte for a in addresses for byte in range(a, a + size)}
    return len(touched), -(-len(asked) // 32)


def _wavefronts_by_hand(lanes: list[tuple[int, int]], size: int) -> tuple[int, int]:
    phases: dict[int, set[int]] = defaultdict(set)
    for lane, address in lanes:
        phases[lane * max(4, size) // 128] |= {byte // 4 for byte in range(address, address + size)}
    taken = least = 0
    for words in phases.values():
        banks = [word % 32 for word in words]
        taken += max(banks.count(b) for b in set(banks))
        least += -(-len(words) // 32)
    return taken, least


@given(
    size=st.sampled_from([1, 2, 4, 8, 16]),
    data=st.lists(st.lists(st.tuples(st.integers(0, 200), st.booleans()), min_size=32, max_size=32), max_size=3),
)
def test_any_access_is_counted_as_one_lane_after_the_other_would_be(
    size: int, data: list[list[tuple[int, bool]]]
) -> None:
    addresses = np.array([[a * size for a, _ in warp] for warp in data], np.int64).reshape(-1, 32)
    active = np.array([[b for _, b in warp] for warp in data], np.bool_).reshape(-1, 32)
    lanes = [[(i, a * size) for i, (a, b) in enumerate(warp) if b] for warp in data]
    by_hand = [_sectors_by_hand([a for _, a in warp], size) for warp in lanes]
    assert sectors(addresses, size, active) == tuple(map(sum, zip(*by_hand, strict=True))) if data else (0, 0)
    shared = [_wavefronts_by_hand(warp, size) for warp in lanes]
    assert wavefronts(addresses, size, active) == tuple(map(sum, zip(*shared, strict=True))) if data else (0, 0)

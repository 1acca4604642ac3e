"""The accesses of other warps that a warp knows to be over: happens-before, by barriers, releases and acquires."""

from __future__ import annotations

import numpy as np

from ..observer import Launch
from ..program import Instruction

_ACQUIRES, _RELEASES = ("acquire", "acq_rel"), ("release", "acq_rel")


class Order:
    """For each warp of the grid, the time up to which it knows each other warp's accesses (a vector clock).

    Barriers of whole blocks are one number a block. Other knowledge (barriers of some warps, acquires) is a row of
    times, over all warps, for the warps that have any.
    """

    def __init__(self, launch: Launch) -> None:
        self.per_block = launch.threads // 32
        self.warps = launch.blocks * self.per_block
        self.barrier_time = np.zeros(launch.blocks, np.int64)
        self.rows: dict[int, np.ndarray] = {}
        self.released: dict[int, np.ndarray] = {}

    def known(self, me: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(n,) times up to which warps `me` know what warps `other` did."""
        block = me // self.per_block
        times = np.where(block == other // self.per_block, self.barrier_time[block], 0)
        for warp, row in self.rows.items():
            mine = np.flatnonzero(me == warp)
            if mine.size:
                times[mine] = np.maximum(times[mine], row[other[mine]])
        return times

    def whole_barrier(self, blocks: np.ndarray, now: int) -> None:
        """All warps of some blocks meet: each knows what any of them knew."""
        self.barrier_time[blocks] = now
        there = {warp // self.per_block for warp in self.rows} & set(blocks.tolist())
        for block in there:
            warps = range(block * self.per_block, (block + 1) * self.per_block)
            merged: np.ndarray = np.maximum.reduce([self.rows[w] for w in warps if w in self.rows])
            self.rows |= dict.fromkeys(warps, merged)

    def some_barrier(self, warps: np.ndarray, now: int) -> None:
        """Some warps of one block meet."""
        merged: np.ndarray = np.maximum.reduce([self._row(int(w)) for w in warps])
        merged[warps] = now
        self.rows |= dict.fromkeys(warps.tolist(), merged)

    def synchronize(self, instruction: Instruction, warp: int, address: int, now: int) -> None:
        """An access with acquire or release semantics, in a warp's turn."""
        if any(m in _ACQUIRES for m in instruction.modifiers) and address in self.released:
            self.rows[warp] = np.maximum(self._row(warp), self.released[address])
        if any(m in _RELEASES for m in instruction.modifiers):
            row = self._row(warp)
            row[warp] = now
            before = self.released.get(address)
            self.released[address] = row if before is None else np.maximum(row, before)

    def _row(self, warp: int) -> np.ndarray:
        """A fresh row of all that a warp knows."""
        row = self.rows[warp].copy() if warp in self.rows else np.zeros(self.warps, np.int64)
        block = warp // self.per_block
        own = slice(block * self.per_block, (block + 1) * self.per_block)
        row[own] = np.maximum(row[own], self.barrier_time[block])
        return row


def synchronizes(instruction: Instruction) -> bool:
    """True if an access orders others."""
    return any(m in ("acquire", "release", "acq_rel") for m in instruction.modifiers)

"""The latest accesses to every cell of a memory, by warp: what a race check compares an access with."""

from __future__ import annotations

import numpy as np

_FIELDS = ("warp", "time", "place")


class Latest:
    """For each cell the latest access of one kind, the latest by another warp than that, and the latest by another
    block: with the first alone, a warp's own access would hide another's.

    Each is (warp, time, index of the instruction); warp -1 for none.
    """

    def __init__(self, count: int, slots: int) -> None:
        self.slots = [{f: np.full(count, -1 if f == "warp" else 0, np.int32) for f in _FIELDS} for _ in range(slots)]
        self.any = False

    def refine(self, factor: int) -> None:
        """Smaller cells: each becomes `factor` of the same history."""
        self.slots = [{f: np.repeat(a, factor) for f, a in slot.items()} for slot in self.slots]

    def record(self, cells: np.ndarray, warps: np.ndarray, time: int, place: int, per_block: int) -> None:
        """An access by (n,) warps to (n,) cells."""
        self.any = True
        first = self.slots[0]
        if len(self.slots) > 1:
            before = {f: first[f][cells] for f in _FIELDS}
            foreign = (before["warp"] >= 0) & (before["warp"] != warps)
            self._keep(1, cells, before, foreign)
            if len(self.slots) > 2:
                self._keep(2, cells, before, foreign & (before["warp"] // per_block != warps // per_block))
        first["warp"][cells], first["time"][cells], first["place"][cells] = warps, time, place
        if len(self.slots) > 1:
            # Of several warps in this very access one is first; another is the second.
            winner = first["warp"][cells]
            mine = {"warp": warps, "time": np.full(warps.size, time), "place": np.full(warps.size, place)}
            other = winner != warps
            self._keep(1, cells, mine, other)
            if len(self.slots) > 2:
                self._keep(2, cells, mine, other & (winner // per_block != warps // per_block))

    def _keep(self, slot: int, cells: np.ndarray, what: dict[str, np.ndarray], chosen: np.ndarray) -> None:
        if chosen.any():
            for field in _FIELDS:
                self.slots[slot][field][cells[chosen]] = what[field][chosen]


class History:
    """Reads, writes and atomics of one memory of `size` bytes, in cells of 4 bytes, or 1 once an access needs it."""

    def __init__(self, size: int, slots: int) -> None:
        self.granule = 4
        self.count = -(-size // 4)
        self.extra_slots = slots
        self.reads = Latest(self.count, slots)
        self.writes = Latest(self.count, 1)
        self.atomics: Latest | None = None

    def prepare(self, size: int, starts: np.ndarray) -> None:
        """Make the cells small enough for an access."""
        if self.granule == 4 and (size % 4 or (starts % 4).any()):
            for latest in (self.reads, self.writes, self.atomics):
                if latest is not None:
                    latest.refine(4)
            self.granule, self.count = 1, self.count * 4

    def of(self, kind: str) -> Latest:
        """The record of the accesses of a kind: "read", "write" or "atomic"."""
        if kind == "atomic" and self.atomics is None:
            self.atomics = Latest(self.count, self.extra_slots)
        found = {"read": self.reads, "write": self.writes, "atomic": self.atomics}[kind]
        assert found is not None
        return found

    def against(self, kind: str) -> list[tuple[str, Latest]]:
        """The records that an access of a kind can race with: a read not with reads, an atomic not with atomics."""
        all_kinds = [("write", self.writes), ("read", self.reads), ("atomic", self.atomics)]
        return [
            (k, latest)
            for k, latest in all_kinds
            if latest is not None and latest.any and not (kind == k and kind != "write")
        ]

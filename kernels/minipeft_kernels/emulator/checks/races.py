"""Finds data races: accesses to one byte by two warps, one of them a write, that nothing orders.

Barriers order what the warps of a block do, releases and acquires (`atom.acq_rel` and the like) what blocks do. Fences
with relaxed accesses are not followed. Lanes of one warp do not race: they run in step. Accesses are compared as they
happen here to be ordered, so a run finds the races of its inputs and paths, whatever the order that its warps ran in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import RaceError
from ..memory import Buffer
from ..observer import Batch, Launch, Observer
from ..parse import SHARED_BASE
from ..program import Instruction
from .history import History, Latest
from .order import Order, synchronizes
from .shadow import SharedOffsets, cells

_KINDS = {
    **{"load": "read", "async": "read", "matrix": "read", "store": "write", "atomic": "atomic", "arrive": "write"},
}


@dataclass(frozen=True)
class _Access:
    """The effect of one instruction on memory: each of `cells` is touched by the warp at its place in `warps`.

    history, buffer: of the memory, buffer None for shared memory. what: "read", "write" or "atomic".
    """

    history: History
    buffer: Buffer | None
    instruction: Instruction
    what: str
    cells: np.ndarray
    warps: np.ndarray


class Races(Observer):
    """Raises RaceError for two accesses that race, in shared or in global memory.

    Args:
        same_value: also report stores that change nothing: two warps that write the same bytes to one place. Without,
            a store of what is there already counts as none.
        collect: do not raise, but keep one message for each pair of instructions in `found`.
    """

    def __init__(self, same_value: bool = True, collect: bool = False) -> None:
        self.same_value, self.collect = same_value, collect
        self.found: dict[tuple[int, int, str], str] = {}

    def begin(self, launch: Launch) -> None:
        """Start with no access to global memory, and no order between warps."""
        self.launch = launch
        self.order = Order(launch)
        self.now = 0
        self.global_history: dict[Buffer, History] = {}

    def begin_batch(self, batch: Batch) -> None:
        """Start with no access to the shared memory of these blocks."""
        self.batch = batch
        self.offsets = SharedOffsets(batch.blocks, self.launch.all_shared_bytes, batch.threads, SHARED_BASE)
        self.shared_history = History(self.offsets.size, slots=2)
        self.shared_bytes: np.ndarray = np.zeros(self.offsets.size, np.uint8)

    def barrier(self, instruction: Instruction, lanes: np.ndarray, whole: bool) -> None:
        """Order the accesses before a barrier with those after it."""
        self.now += 1
        if whole:
            self.order.whole_barrier(np.unique(self.batch.block_of(lanes)), self.now)
            return
        warps = np.unique(self._warps(lanes))
        for block in np.unique(warps // self.order.per_block):
            self.order.some_barrier(warps[warps // self.order.per_block == block], self.now)

    def global_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Let synchronizing accesses order others, and check all but stores, which `stored` checks."""
        if not lanes.size:
            return
        self.now += 1
        if synchronizes(instruction):
            pairs = np.unique(np.stack((self._warps(lanes), addresses), 1), axis=0)
            for warp, address in pairs.tolist():
                self.order.synchronize(instruction, warp, address, self.now)
        if kind != "store":
            self._global(instruction, "atomic" if _strong(instruction) else _KINDS[kind], lanes, addresses, size)

    def stored(
        self, instruction: Instruction, space: str, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray
    ) -> None:
        """Check a store against the accesses that it may race with; with `same_value` false, only what it changes."""
        size = values.dtype.itemsize
        if space == "shared":
            starts = self.offsets.of(lanes, addresses)
            raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
            chosen = self._changing(self.shared_bytes[cells(starts, size, 1)], raw, starts)
            self.shared_bytes[cells(starts, size, 1)] = raw
            self._touch(self.shared_history, None, instruction, "write", lanes[chosen], starts[chosen], size)
            return
        current = self.launch.memory.load(addresses, size).view(np.uint8).reshape(-1, size)
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
        chosen = self._changing(current, raw, addresses)
        if chosen.any():
            what = "atomic" if _strong(instruction) else "write"
            self._global(instruction, what, lanes[chosen], addresses[chosen], size)

    def shared_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Check all accesses but stores, which `stored` checks."""
        self.now += 1
        if kind == "store":
            return
        starts = self.offsets.of(lanes, addresses)
        # A copy may write at any time from its start to its arrival.
        what = "write" if kind == "async" else _KINDS[kind]
        self._touch(self.shared_history, None, instruction, what, lanes, starts, size)

    def _warps(self, lanes: np.ndarray) -> np.ndarray:
        """Number in the grid of each lane's warp."""
        inside = lanes % self.batch.threads // 32
        return self.batch.block_of(lanes) * self.order.per_block + inside

    def _changing(self, current: np.ndarray, new: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """True for each lane whose store counts."""
        if self.same_value:
            return np.ones(starts.size, bool)
        changing = (current != new).any(1)
        # Of lanes that store the same bytes to one place, the first counts.
        rows = np.concatenate((starts[:, None], new.astype(np.int64)), 1)
        first = np.zeros(starts.size, bool)
        first[np.unique(rows, axis=0, return_index=True)[1]] = True
        return changing & first

    def _global(self, instruction: Instruction, what: str, lanes: np.ndarray, addresses: np.ndarray, size: int) -> None:
        for buffer, positions in self.launch.memory.parts(addresses, size):
            history = self.global_history.get(buffer)
            if history is None:
                history = self.global_history[buffer] = History(buffer.data.size, slots=3)
            some = slice(None) if positions is None else positions
            self._touch(history, buffer, instruction, what, lanes[some], addresses[some] - buffer.start, size)

    def _touch(
        self,
        history: History,
        buffer: Buffer | None,
        instruction: Instruction,
        what: str,
        lanes: np.ndarray,
        starts: np.ndarray,
        size: int,
    ) -> None:
        """Compare an access with those before it, then remember it."""
        if not lanes.size:
            return
        history.prepare(size, starts)
        touched = cells(starts, size, history.granule)
        warps = np.repeat(self._warps(lanes), touched.shape[1])
        access = _Access(history, buffer, instruction, what, touched.ravel(), warps)
        for kind, latest in history.against(what):
            self._compare(access, kind, latest)
        kept = history.of(what)
        kept.record(access.cells, warps, self.now, instruction.index, self.order.per_block)
        if what == "write":
            winner = kept.slots[0]["warp"][access.cells]
            clash = np.flatnonzero(winner != warps)
            if clash.size:
                self._report(access, int(clash[0]), "write", kept.slots[0])

    def _compare(self, access: _Access, kind: str, latest: Latest) -> None:
        for slot in latest.slots:
            other = slot["warp"][access.cells]
            foreign = np.flatnonzero((other >= 0) & (other != access.warps))
            if not foreign.size:
                continue
            known = self.order.known(access.warps[foreign], other[foreign])
            racing = foreign[slot["time"][access.cells[foreign]] > known]
            if racing.size:
                self._report(access, int(racing[0]), kind, slot)

    def _report(self, access: _Access, position: int, kind: str, slot: dict[str, np.ndarray]) -> None:
        cell, buffer, instruction = int(access.cells[position]), access.buffer, access.instruction
        before = self.launch.program.instructions[int(slot["place"][cell])]
        key = (before.index, instruction.index, buffer.name if buffer else "")
        if key in self.found:
            return
        byte = cell * access.history.granule
        if buffer is not None:
            where = f"byte {byte} of {buffer.name} ({buffer.data.size} bytes)"
        else:
            where = f"byte {byte % self.offsets.stride} of shared memory"
        warp = self._warp(int(access.warps[position]))
        message = (
            f"race on {where}: {warp} {_PAST[access.what]} it at {instruction.place}, "
            f"{self._warp(int(slot['warp'][cell]))} {_PAST[kind]} it at {before.place}, and no barrier or acquire is "
            "between them"
        )
        self.found[key] = message
        if not self.collect:
            raise RaceError(message)

    def _warp(self, warp: int) -> str:
        block, inside = divmod(warp, self.order.per_block)
        return f"block {self.launch.place(block)}, warp {inside}"


_PAST = {"read": "reads", "write": "writes", "atomic": "updates"}


def _strong(instruction: Instruction) -> bool:
    """True if a load or store is one that may meet atomics: relaxed, acquiring, releasing or volatile."""
    return any(m in ("relaxed", "acquire", "release", "volatile", "mmio") for m in instruction.modifiers)

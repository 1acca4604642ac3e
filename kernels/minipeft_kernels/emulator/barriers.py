"""Barriers of blocks (PTX ISA 9.7.13.1): who has arrived, who may go on, and who should not be there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .errors import BarrierError
from .lanes import ANY, WARP, Lanes
from .observer import Observer
from .steps import Step

Released = list[tuple[int, ANY]]


class _Waiting:
    """Lanes that arrived by one instruction; `waits` False if they went on (arrive)."""

    def __init__(self, step: Step, pc: int, lanes: np.ndarray) -> None:
        self.step, self.pc, self.lanes = step, pc, lanes


class Barriers:
    """The sixteen barriers of every block of a batch."""

    def __init__(self, lanes: Lanes, watchers: list[Observer]) -> None:
        self.lanes, self.watchers = lanes, watchers
        self.waiting: dict[int, list[_Waiting]] = {}
        self.counted: dict[int, np.ndarray] = {}

    def arrive(self, step: Step, pc: int, active: ANY, alive: np.ndarray) -> Released | None:
        """Lanes come to a barrier. Who goes on from where; None if it is they, all of them, and nobody else.

        Raises:
            BarrierError: lanes of one warp wait at two different instructions, or a barrier is left though threads of
                its block have exited.
        """
        assert step.barrier is not None
        numbers = step.barrier(active)
        plain = numbers.size == 1 and step.arriving is None and step.waits
        if plain and active is None and int(numbers[0]) not in self.waiting:
            self._tell(step, self.lanes.everyone, True)
            return None
        who = self.lanes.indices(active)
        numbers = np.broadcast_to(numbers, who.shape)
        released: Released = [] if step.waits else [(pc + 1, active)]
        for number in np.unique(numbers).tolist():
            some = who[numbers == number]
            self.waiting.setdefault(number, []).append(_Waiting(step, pc, some))
            if step.arriving is not None:
                wanted = np.broadcast_to(step.arriving(active), who.shape)[numbers == number]
                table = self.counted.setdefault(number, np.zeros(self.lanes.blocks, np.int64))
                table[some // self.lanes.threads] = wanted
            released += self._complete(number, alive)
        return released

    def exited(self, alive: np.ndarray, lanes: ANY) -> Released:
        """Threads end: a barrier that waited for them may be complete, which `_complete` refuses."""
        released: Released = []
        for number in list(self.waiting):
            released += self._complete(number, alive)
        return released

    def where(self) -> Iterator[tuple[np.ndarray, int]]:
        """The lanes that wait, with their instruction."""
        for entries in self.waiting.values():
            for entry in entries:
                if entry.step.waits:
                    yield entry.lanes, entry.pc

    def _complete(self, number: int, alive: np.ndarray) -> Released:
        threads, blocks = self.lanes.threads, self.lanes.blocks
        entries = self.waiting[number]
        arrived = np.zeros(blocks, np.int64)
        for entry in entries:
            arrived += np.bincount(entry.lanes // threads, minlength=blocks)
        living = alive.reshape(blocks, threads).sum(1)
        counted = self.counted.setdefault(number, np.zeros(blocks, np.int64))
        wanted = np.where(counted > 0, counted, living)
        done = (arrived >= wanted) & (arrived > 0)
        if not done.any():
            return []
        self._refuse_exited(entries, done & (counted == 0) & (living < threads), living)
        counted[done] = 0
        return self._release(number, entries, done, wanted)

    def _release(self, number: int, entries: list[_Waiting], done: np.ndarray, wanted: np.ndarray) -> Released:
        threads = self.lanes.threads
        released: Released = []
        kept, through = [], []
        place: np.ndarray = np.full(self.lanes.count // WARP, -1)
        for entry in entries:
            leaving = done[entry.lanes // threads]
            if not leaving.all():
                kept.append(_Waiting(entry.step, entry.pc, entry.lanes[~leaving]))
            going = entry.lanes[leaving]
            if not going.size:
                continue
            through.append(going)
            if entry.step.aligned:
                self._refuse_split_warps(entry, going, place)
            if entry.step.waits:
                released.append((entry.pc + 1, going if going.size < self.lanes.count else None))
        if kept:
            self.waiting[number] = kept
        else:
            del self.waiting[number]
        everyone = np.sort(np.concatenate(through))
        self._tell(entries[-1].step, everyone, bool((wanted[done] == threads).all()))
        return released

    def _tell(self, step: Step, lanes: np.ndarray, whole: bool) -> None:
        for watcher in self.watchers:
            watcher.barrier(step.instruction, lanes, whole)

    def _refuse_split_warps(self, entry: _Waiting, going: np.ndarray, place: np.ndarray) -> None:
        """An aligned barrier must be one instruction for all lanes of a warp."""
        warps = going // WARP
        elsewhere = (place[warps] >= 0) & (place[warps] != entry.pc)
        if elsewhere.any():
            lane = int(going[np.flatnonzero(elsewhere)[0]])
            raise BarrierError(
                f"barrier under divergence: {self.lanes.describe(lane)} waits at {entry.step.instruction.place}, and "
                f"other lanes of its warp at instruction {int(place[lane // WARP])}"
            )
        place[warps] = entry.pc

    def _refuse_exited(self, entries: list[_Waiting], short: np.ndarray, living: np.ndarray) -> None:
        """A barrier of the block that not all of its threads can reach."""
        if not short.any():
            return
        block = int(np.flatnonzero(short)[0])
        entry = next(e for e in entries if (e.lanes // self.lanes.threads == block).any())
        lane = int(entry.lanes[entry.lanes // self.lanes.threads == block][0])
        raise BarrierError(
            f"barrier after an exit: {self.lanes.threads - int(living[block])} of {self.lanes.threads} threads have "
            f"exited and never reach {entry.step.instruction.place}, where {self.lanes.describe(lane)} waits"
        )

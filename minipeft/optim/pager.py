"""Moves pages between tiers so that each is in the first tier when its turn comes.

A sweep visits pages in an order that is known beforehand, and so is, closely enough, the order of the next sweep. So
the pager never guesses: where room is needed, it sends away the page whose next use is farthest in the future (Belady
1966, "A study of replacement algorithms for a virtual-storage computer", the least possible number of moves), and it
fetches the page whose next use is nearest, ahead of time, in a thread of its own, as long as that displaces nothing
that is needed earlier. A page is in one place only; every update changes all of a page, so no copy left behind would
be of use.

When all pages fit into the first tier, there is no thread, and nothing moves.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minipeft.optim.errors import PagingError
from minipeft.optim.tiers import MemoryTier, Tier

NOWHERE = -1  # the place of a page that was never written: it is all zeros
NEVER = 1 << 60


@dataclass
class Place:
    """Where a page is. `users` counts who works on it, `moving` is set while it is copied."""

    level: int = NOWHERE
    slot: int = -1
    users: int = 0
    moving: bool = False
    next_use: int = NEVER


@dataclass
class Stats:
    """Counts since the pager was made. `stall_seconds`: how long the arithmetic waited for pages."""

    page_ins: int = 0
    page_outs: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0
    by_link: dict[str, int] = field(default_factory=dict)
    trace: list[tuple[float, str, int, str]] | None = None


class Pager:
    """Pages in a stack of tiers.

    Args:
        tiers: from where the arithmetic happens down to where there is room for all. Neighbours: one is host memory.

    Raises:
        PagingError: a copy failed. What it left half done cannot be told apart from what is whole, so from then on
            every call raises it.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        first = tiers[0]
        assert isinstance(first, MemoryTier)
        self.tiers, self._first = list(tiers), first
        self.stats = Stats()
        self._places: list[Place] = []
        self._order: list[int] = []
        # For each page the indices of its uses in this sweep and the next, the last one first.
        self._uses: list[list[int]] = []
        self._cursor = 0
        # For each tier the evictable pages, farthest next use first; entries that no longer hold are skipped.
        self._farthest: list[list[tuple[int, int]]] = [[] for _ in tiers]
        # For each tier the index in the order before which every page is in that tier or above.
        self._fetched = [0] * len(tiers)
        self._demanded: int | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def grow(self, pages: int) -> None:
        """Have so many pages in all; new ones are zeros."""
        with self._wake:
            self._places += [Place() for _ in range(pages - len(self._places))]

    @property
    def all_fit(self) -> bool:
        return len(self._places) <= self.tiers[0].slots

    @property
    def in_use(self) -> bool:
        """Whether any page was ever written."""
        return any(place.level != NOWHERE for place in self._places)

    def begin_sweep(self, order: Sequence[int], next_order: Sequence[int]) -> None:
        """Announce the pages to be used, in their order, and the order expected after that."""
        with self._wake:
            self._check()
            self._order, self._cursor = list(order), 0
            self._fetched = [0] * len(self.tiers)
            self._uses = [[] for _ in self._places]
            for index, page in reversed(list(enumerate([*order, *next_order]))):
                self._uses[page].append(index)
            for page in range(len(self._places)):
                self._set_next_use(page)
            for level in range(len(self.tiers)):
                self._farthest[level] = [
                    (-place.next_use, page) for page, place in enumerate(self._places) if place.level == level
                ]
                heapq.heapify(self._farthest[level])
            self._wake.notify_all()
        if not self.all_fit and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="minipeft-pager", daemon=True)
            self._thread.start()

    @contextlib.contextmanager
    def use(self, page: int) -> Iterator[Tensor]:
        """The page, uint8 (page_bytes,), in the first tier; it stays there within the block."""
        place = self._enter(page)
        try:
            yield self._first.view(place.slot)
        finally:
            self._leave(page, place)

    def bytes_by_tier(self) -> dict[str, dict[str, int]]:
        """For each tier what is in use, what was at most, and what may be."""
        with self._wake:
            return {
                tier.name: {
                    "bytes": tier.used * tier.page_bytes,
                    "peak_bytes": tier.peak * tier.page_bytes,
                    "budget_bytes": tier.slots * tier.page_bytes,
                }
                for tier in self.tiers
            }

    def close(self) -> None:
        """Stop, and give all memory back. May be called twice."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for tier in self.tiers:
            tier.close()

    # The thread that computes.

    def _enter(self, page: int) -> Place:
        place = self._places[page]
        with self._wake:
            self._check()
            if place.level == 0 and not place.moving:
                place.users += 1
                return place
            if self._thread is None:
                self._bring(page)
            else:
                self._wait_for(page, place)
            place.users += 1
            return place

    def _wait_for(self, page: int, place: Place) -> None:
        started = time.perf_counter()
        self._demanded = page
        self._wake.notify_all()
        while (place.level != 0 or place.moving) and self._error is None and not self._closed:
            self._wake.wait()
        self._demanded = None
        self.stats.stall_seconds += time.perf_counter() - started
        self._check()

    def _leave(self, page: int, place: Place) -> None:
        self._first.mark_used(place.slot)
        with self._wake:
            place.users -= 1
            self._trace("used", page, 0)
            self._pass(page)
            self._set_next_use(page)
            heapq.heappush(self._farthest[0], (-place.next_use, page))
            self._wake.notify_all()

    def _pass(self, page: int) -> None:
        """Move on in the order: past this use of the page, and past what was left out before it."""
        if self._cursor and self._order[self._cursor - 1] == page:
            return
        self._set_next_use(page)
        if self._places[page].next_use < len(self._order):
            self._cursor = self._places[page].next_use + 1

    def _set_next_use(self, page: int) -> None:
        uses = self._uses[page]
        while uses and uses[-1] < self._cursor:
            uses.pop()
        self._places[page].next_use = uses[-1] if uses else NEVER

    def _check(self) -> None:
        if self._error is not None:
            raise PagingError(
                f"optimizer state is incomplete since a page could not be moved ({self._error}); "
                "load the state of a checkpoint into a new optimizer"
            ) from self._error
        if self._closed:
            raise PagingError("the optimizer is closed, its state is gone")

    # The thread that moves pages. Every method below is entered with the lock held; copies are made without it.

    def _run(self) -> None:
        with self._wake:
            while not self._closed:
                try:
                    if not self._advance():
                        self._wake.wait()
                except BaseException as error:
                    self._error = error
                    self._wake.notify_all()
                    return

    def _advance(self) -> bool:
        """Make one useful move, if there is one."""
        if self._demanded is not None and self._places[self._demanded].level != 0:
            return self._bring(self._demanded)
        for level in range(len(self.tiers) - 1):
            page = self._next_below(level)
            if page is not None and self._raise_to(level, page):
                return True
        return False

    def _next_below(self, level: int) -> int | None:
        """The page used soonest that is not yet in tier `level` or above."""
        index = max(self._fetched[level], self._cursor)
        while index < len(self._order) and NOWHERE < self._places[self._order[index]].level <= level:
            index += 1
        self._fetched[level] = index
        return self._order[index] if index < len(self._order) else None

    def _bring(self, page: int) -> bool:
        """Bring a page to the first tier, step by step, whatever has to leave for it."""
        place = self._places[page]
        while place.level != 0:
            level = 0 if place.level == NOWHERE else place.level - 1
            if not self._raise_to(level, page, forced=True):
                return False
        return True

    def _raise_to(self, level: int, page: int, forced: bool = False) -> bool:
        place = self._places[page]
        if place.level == NOWHERE:
            # Written for the first time by the arithmetic: nothing is to be copied.
            return level == 0 and self._make_room(0, page, forced) and self._create(page)
        if place.level != level + 1 or place.moving:
            return False
        if not self._make_room(level, page, forced):
            return False
        self._move(page, level)
        return True

    def _make_room(self, level: int, page: int, forced: bool) -> bool:
        """Have a free slot in tier `level` for `page`, unless what would have to leave is needed sooner."""
        # Between two tiers one slot stays free: without it, two full tiers could not exchange pages.
        reserve = 1 if 0 < level < len(self.tiers) - 1 else 0
        while self.tiers[level].free <= reserve:
            victim = self._victim(level, keep=page)
            if victim is None:
                return False
            if not forced and self._places[victim].next_use < self._places[page].next_use:
                heapq.heappush(self._farthest[level], (-self._places[victim].next_use, victim))
                return False
            self._send_down(victim, level, keep=page)
        return True

    def _send_down(self, victim: int, level: int, keep: int) -> None:
        """Move a page to the next tier, and make the slot free again that it takes there."""
        below = level + 1
        self._move(victim, below)
        while below < len(self.tiers) - 1 and self.tiers[below].free == 0:
            farthest = self._victim(below, keep)
            assert farthest is not None
            self._send_down(farthest, below, keep)

    def _victim(self, level: int, keep: int) -> int | None:
        """The page of a tier that is needed last and may leave, taken off the tier's list."""
        waiting, found = [], None
        farthest = self._farthest[level]
        while farthest and found is None:
            entry = heapq.heappop(farthest)
            page, place = entry[1], self._places[entry[1]]
            if place.level != level or -entry[0] != place.next_use:
                continue
            # What is waited for must not leave before it was used.
            if place.users or place.moving or page in (keep, self._demanded):
                waiting.append(entry)
            else:
                found = page
        for entry in waiting:
            heapq.heappush(farthest, entry)
        return found

    def _create(self, page: int) -> bool:
        place = self._places[page]
        slot = self._first.take()
        place.moving = True
        with self._unlocked():
            self._first.clear(slot)
        place.level, place.slot, place.moving = 0, slot, False
        heapq.heappush(self._farthest[0], (-place.next_use, page))
        self._trace("created", page, 0)
        self._wake.notify_all()
        return True

    def _move(self, page: int, level: int) -> None:
        """Copy a page into a free slot of the tier `level`, a neighbour of its own."""
        place = self._places[page]
        source, target = self.tiers[place.level], self.tiers[level]
        slot = target.take()
        place.moving = True
        with self._unlocked():
            if isinstance(source, MemoryTier) and source.is_host:
                target.put(slot, page, source.view(place.slot))
            else:
                assert isinstance(target, MemoryTier) and target.is_host
                source.get(place.slot, page, target.view(slot))
        source.give_back(place.slot)
        self._count(page, place.level, level)
        # What leaves a tier must be fetched again.
        for passed in range(place.level, level):
            self._fetched[passed] = min(self._fetched[passed], place.next_use)
        place.level, place.slot, place.moving = level, slot, False
        heapq.heappush(self._farthest[level], (-place.next_use, page))
        self._wake.notify_all()

    def _count(self, page: int, old: int, new: int) -> None:
        size, stats = self._first.page_bytes, self.stats
        link = f"{self.tiers[old].name}->{self.tiers[new].name}"
        stats.by_link[link] = stats.by_link.get(link, 0) + size
        if new < old:
            stats.bytes_in += size
            stats.page_ins += new == 0
        else:
            stats.bytes_out += size
            stats.page_outs += old == 0
        self._trace("in" if new < old else "out", page, new)

    def _trace(self, event: str, page: int, level: int) -> None:
        if self.stats.trace is not None:
            self.stats.trace.append((time.perf_counter(), event, page, self.tiers[level].name))

    @contextlib.contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._wake.release()
        try:
            yield
        finally:
            self._wake.acquire()

    def trace(self, on: bool) -> list[Any]:
        """Begin to note every move, or stop; returns what was noted so far: (seconds, event, page, tier)."""
        with self._wake:
            noted, self.stats.trace = self.stats.trace or [], [] if on else None
            return noted

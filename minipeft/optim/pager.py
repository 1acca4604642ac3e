"""Moves pages between tiers so that each is in the first tier when its turn comes.

A sweep visits pages in an order that is known beforehand, and so is, closely enough, the order of the next sweep. So
the pager never guesses: where room is needed, it sends away the page whose next use is farthest in the future (Belady
1966, "A study of replacement algorithms for a virtual-storage computer": the least possible number of moves), and it
fetches the page whose next use is nearest, ahead of time, as long as that displaces nothing that is needed earlier.
Three threads do so: one page leaves while another comes, and the next copy is queued when either is done. A page is in
one place only; every update changes all of a page, so no copy left behind would be of use.

When all pages fit into the first tier, there are no threads, and nothing moves.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minipeft.optim.tiers import MemoryTier, PagingError, Tier

MOVERS = 3  # copies that may be under way: one in each direction, and one that waits for either
NEVER = 1 << 60  # the number of a use that does not come
NOWHERE = -1  # the level of a page that was never written: it is all zeros


class Order:
    """Uses of pages, numbered: first those of this sweep, then those of the next.

    Attributes:
        pages: the pages of this sweep, use by use.
        cursor: how many uses of this sweep are over.
        ahead: how many uses ahead of the cursor pages are to be fetched.
    """

    def __init__(self, pages: Sequence[int], next_pages: Sequence[int], count: int, ahead: int = NEVER) -> None:
        self.pages, self.cursor, self.ahead = list(pages), 0, ahead
        # For each of `count` pages its uses, the first one last.
        self._uses: list[list[int]] = [[] for _ in range(count)]
        for index, page in reversed(list(enumerate([*pages, *next_pages]))):
            self._uses[page].append(index)

    def next_use(self, page: int) -> int:
        """The number of the page's next use that is not over, or NEVER."""
        uses = self._uses[page]
        while uses and uses[-1] < self.cursor:
            uses.pop()
        return uses[-1] if uses else NEVER

    def pass_use(self, page: int) -> None:
        """The page was used: go on past this use, and past those that were left out before it."""
        at_cursor = self.pages[self.cursor : self.cursor + 1] == [page]
        if not at_cursor and self.cursor and self.pages[self.cursor - 1] == page:
            # The page was used once more than expected: the cursor stands behind it already.
            return
        use = self.next_use(page)
        if use < len(self.pages):
            self.cursor = use + 1


@dataclass
class Place:
    """A page's tier and slot.

    `users` counts the blocks of `Pager.use` that hold it; a page that is `moving`, to the level `target`, belongs to
    one of the movers.
    """

    level: int = NOWHERE
    slot: int = -1
    users: int = 0
    moving: bool = False
    target: int = NOWHERE
    next_use: int = NEVER


class Farthest:
    """The pages of one tier, farthest next use first.

    A page is listed anew whenever its place or its next use changes; entries that no longer hold are passed over.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []

    def add(self, page: int, place: Place) -> None:
        """List a page with its present next use."""
        heapq.heappush(self._heap, (-place.next_use, page))

    def take(self, level: int, places: list[Place], kept: int | None) -> int | None:
        """The page of tier `level` that is needed last and may leave, taken off the list; `kept` may not."""
        waiting, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            page, place = entry[1], places[entry[1]]
            if place.level != level or -entry[0] != place.next_use:
                continue
            if place.users or place.moving or page == kept:
                waiting.append(entry)
            else:
                found = page
        for entry in waiting:
            heapq.heappush(self._heap, entry)
        return found


@dataclass
class Moves:
    """Counts since the pager was made. `stall_seconds`: how long the arithmetic waited for pages.

    `trace`: (time, event, page, tier) in order, while it is recorded.
    """

    page_ins: int = 0
    page_outs: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    stall_seconds: float = 0.0
    by_link: dict[str, int] = field(default_factory=dict)
    trace: list[tuple[float, str, int, str]] | None = None

    def count(self, page: int, size: int, old: int, new: int, names: tuple[str, str]) -> None:
        """A page of `size` bytes went from level `old` to `new`; `names` are those of the two tiers."""
        link = "->".join(names)
        self.by_link[link] = self.by_link.get(link, 0) + size
        if new < old:
            self.bytes_in += size
            self.page_ins += new == 0
        else:
            self.bytes_out += size
            self.page_outs += old == 0
        self.note("in" if new < old else "out", page, names[1])

    def note(self, event: str, page: int, tier: str) -> None:
        """Append an event to the trace, if one is recorded."""
        if self.trace is not None:
            self.trace.append((time.perf_counter(), event, page, tier))


class Pager:
    """Pages in a stack of tiers.

    Args:
        tiers: from where the arithmetic happens down to where there is room for all. Of neighbours, one is host memory.

    Raises:
        PagingError: a copy failed. What it left half done cannot be told apart from what is whole, so from then on
            every call raises it.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        first = tiers[0]
        assert isinstance(first, MemoryTier)
        self.tiers, self._first = list(tiers), first
        self.stats = Moves()
        self._places: list[Place] = []
        self._order = Order([], [], 0)
        self._farthest = [Farthest() for _ in tiers]
        # For each tier the use before which every page is in that tier or above.
        self._fetched = [0] * len(tiers)
        self._demanded: int | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._wake = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._lost_by_fork = False
        _PAGERS.add(self)

    def grow(self, pages: int) -> None:
        """Have so many pages in all; new ones are zeros."""
        with self._wake:
            self._places += [Place() for _ in range(pages - len(self._places))]

    @property
    def all_fit(self) -> bool:
        """True if every page has room in the first tier: then nothing moves."""
        return len(self._places) <= self.tiers[0].slots

    @property
    def in_use(self) -> bool:
        """True once any page was written."""
        return any(place.level != NOWHERE for place in self._places)

    def begin_sweep(self, pages: Sequence[int], next_pages: Sequence[int], ahead: int = NEVER) -> None:
        """Announce the pages to be used, in their order, and the order expected after that.

        Args:
            ahead: how many uses ahead pages may be fetched. Where the next sweep runs backwards, whatever was used is
                the best to send away, so the earlier the better. Where it runs forwards again, the best to send away
                is what will have been used last when the new page is needed: then fetching waits for that.
        """
        with self._wake:
            self._check()
            self._order = Order(pages, next_pages, len(self._places), ahead)
            self._fetched = [0] * len(self.tiers)
            self._farthest = [Farthest() for _ in self.tiers]
            for page, place in enumerate(self._places):
                place.next_use = self._order.next_use(page)
                if place.level != NOWHERE:
                    self._farthest[place.level].add(page, place)
            if not self.all_fit and not self._threads:
                for _ in range(MOVERS):
                    self._threads.append(threading.Thread(target=self._run, name="minipeft-pager", daemon=True))
                    self._threads[-1].start()
            self._wake.notify_all()

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

    def trace(self, on: bool) -> None:
        """Begin a new record in `stats.trace`, of where every page is and of every use and move after that; or stop."""
        with self._wake:
            self.stats.trace = [] if on else None
            for page, place in enumerate(self._places):
                if place.level != NOWHERE:
                    self.stats.note("is", page, self.tiers[place.level].name)

    def close(self) -> None:
        """Stop, and give all memory back. May be called twice."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for tier in self.tiers:
            tier.close()

    def leave_parent(self) -> None:
        """Called in a process that was just forked. Pages in host memory are its own; others stay the parent's.

        The movers are not here, and one of them may have held the lock; a spill file is shared with the parent, and a
        page may have been on its way.
        """
        self._wake, self._threads = threading.Condition(), []
        self._lost_by_fork = len(self.tiers) > 1

    # The thread that computes.

    def _enter(self, page: int) -> Place:
        place = self._places[page]
        with self._wake:
            self._check()
            if place.level != 0 or place.moving:
                if self._threads:
                    self._wait_for(page, place)
                else:
                    self._bring(page)
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
            self.stats.note("used", page, self._first.name)
            self._order.pass_use(page)
            place.next_use = self._order.next_use(page)
            self._farthest[0].add(page, place)
            self._wake.notify_all()

    def _check(self) -> None:
        if self._lost_by_fork:
            raise PagingError(
                "this process was forked, and optimizer state that moves between memories (device_budget, spill_dir, "
                "CUDA) stays its parent's: make the optimizer after forking, or load a checkpoint into a new one"
            )
        if self._error is not None:
            raise PagingError(
                f"optimizer state is incomplete since a page could not be moved ({self._error}); "
                "go on from a checkpoint, in a new optimizer"
            ) from self._error
        if self._closed:
            raise PagingError("the optimizer is closed, its state is gone")

    # The movers. Every method below is entered with the lock held; copies are made without it.

    def _run(self) -> None:
        with self._wake:
            while not self._closed and self._error is None:
                try:
                    if not self._advance():
                        self._wake.wait()
                except BaseException as error:
                    self._error = error
                    self._wake.notify_all()

    def _advance(self) -> bool:
        """Make one useful move, if there is one."""
        if self._demanded is not None and self._bring(self._demanded):
            return True
        for level in range(len(self.tiers) - 1):
            page = self._next_below(level)
            if page is not None and self._raise_to(level, page):
                return True
        return False

    def _next_below(self, level: int) -> int | None:
        """The page used soonest that is not yet in tier `level` or above, nor has a slot there."""
        order, places = self._order, self._places
        pages, end = order.pages, min(len(order.pages), order.cursor + order.ahead)
        index = max(self._fetched[level], self._order.cursor)
        while index < end and NOWHERE < places[pages[index]].level <= level:
            index += 1
        self._fetched[level] = index
        # A page that comes from farther below has no slot yet: a page used after it must not take the slot.
        while index < end and self._has_slot(places[pages[index]], level):
            index += 1
        return pages[index] if index < end else None

    def _has_slot(self, place: Place, level: int) -> bool:
        return NOWHERE < place.level <= level or (place.moving and place.target <= level)

    def _bring(self, page: int) -> bool:
        """Bring a page to the first tier, step by step, whatever has to leave for it. False: nothing could be done."""
        place, moved = self._places[page], False
        while place.level != 0:
            level = 0 if place.level == NOWHERE else place.level - 1
            if not self._raise_to(level, page, forced=True):
                break
            moved = True
        return moved

    def _raise_to(self, level: int, page: int, forced: bool = False) -> bool:
        """Move a page up to the tier `level`, if it is in the one below and there is room."""
        place = self._places[page]
        if place.moving or place.level != (level + 1 if place.level != NOWHERE or level else NOWHERE):
            return False
        # The mark keeps the other movers from raising or evicting this page meanwhile.
        place.moving, place.target = True, level
        slot = self._claim(level, place, forced)
        if slot is None:
            place.moving = False
        elif place.level == NOWHERE:
            self._create(page, slot)
        else:
            self._move(page, level, slot)
        return slot is not None

    def _claim(self, level: int, place: Place, forced: bool) -> int | None:
        """A slot in tier `level`, unless what would have to leave for it is needed sooner than `place`."""
        tier = self.tiers[level]
        # Between two tiers one slot stays free: without it, two full tiers could not exchange pages.
        if tier.free > (1 if 0 < level < len(self.tiers) - 1 else 0):
            return tier.take()
        if self.tiers[level + 1].free == 0:
            # Another mover is freeing a slot there, and wakes this one when it is done.
            return None
        victim = self._victim(level)
        if victim is None:
            return None
        if not forced and self._places[victim].next_use < place.next_use:
            self._farthest[level].add(victim, self._places[victim])
            return None
        return self._send_down(victim, level)

    def _send_down(self, victim: int, level: int) -> int:
        """Move a page to the tier below, and keep one slot free there. Returns the slot that it had."""
        place, below = self._places[victim], level + 1
        vacated = place.slot
        place.moving, place.target = True, below
        self._move(victim, below, self.tiers[below].take(), keep_slot=True)
        if below < len(self.tiers) - 1 and self.tiers[below].free == 0:
            farthest = self._victim(below)
            # None: every page there is about to leave for the tier above.
            if farthest is not None:
                self.tiers[below].give_back(self._send_down(farthest, below))
        return vacated

    def _victim(self, level: int) -> int | None:
        # Never evict the page that the computing thread is blocked on.
        return self._farthest[level].take(level, self._places, kept=self._demanded)

    def _create(self, page: int, slot: int) -> None:
        """A page is written for the first time by the arithmetic: nothing is to be copied."""
        with self._unlocked():
            self._first.clear(slot)
        self._settle(page, 0, slot)
        self.stats.note("created", page, self._first.name)

    def _move(self, page: int, level: int, slot: int, keep_slot: bool = False) -> None:
        """Copy a page into a slot of the tier `level`, a neighbour of its own."""
        place = self._places[page]
        source, target = self.tiers[place.level], self.tiers[level]
        with self._unlocked():
            if isinstance(source, MemoryTier) and source.is_host:
                target.put(slot, page, source.view(place.slot))
            else:
                assert isinstance(target, MemoryTier) and target.is_host
                source.get(place.slot, page, target.view(slot))
        if not keep_slot:
            source.give_back(place.slot)
        self.stats.count(page, self._first.page_bytes, place.level, level, (source.name, target.name))
        # A page that leaves a tier must be fetched into it again.
        for passed in range(place.level, level):
            self._fetched[passed] = min(self._fetched[passed], place.next_use)
        self._settle(page, level, slot)

    def _settle(self, page: int, level: int, slot: int) -> None:
        place = self._places[page]
        place.level, place.slot, place.moving = level, slot, False
        self._farthest[level].add(page, place)
        self._wake.notify_all()

    @contextlib.contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._wake.release()
        try:
            yield
        finally:
            self._wake.acquire()


_PAGERS: weakref.WeakSet[Pager] = weakref.WeakSet()


def _after_fork() -> None:
    for pager in list(_PAGERS):
        pager.leave_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

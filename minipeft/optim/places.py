"""Where each page is, and which page of a tier is needed last."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from minipeft.optim.order import NEVER

NOWHERE = -1  # the level of a page that was never written: it is all zeros


@dataclass
class Place:
    """Where a page is. `users` counts who works on it; a page that is `moving`, to the level `target`, belongs to one
    of the movers."""

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

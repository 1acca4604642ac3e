"""The order in which pages are used: the sweep at hand and the one expected after it."""

from __future__ import annotations

from collections.abc import Sequence

NEVER = 1 << 60


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
            # Once more than expected.
            return
        use = self.next_use(page)
        if use < len(self.pages):
            self.cursor = use + 1

"""What a pager did: how many bytes moved where, how long the arithmetic waited, and on request every event."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


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
        if self.trace is not None:
            self.trace.append((time.perf_counter(), event, page, tier))

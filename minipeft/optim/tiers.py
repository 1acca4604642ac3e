"""Kinds of memory that pages of optimizer state lie in: host memory, a CUDA device, and a device that is simulated.

A tier is a fixed number of slots, each the size of a page: that number is its budget, so no instant exists at which
more of it is in use. Tiers are stacked: the first is where the arithmetic happens, and each page moves between
neighbours, of which one is always host memory. So a tier that is not host memory needs two verbs only: `get` copies a
slot into a host buffer, `put` a host buffer into a slot; both return when the data has arrived.
"""

from __future__ import annotations

import contextlib
import heapq
import mmap
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Memory is taken at multiples of this, so that the system can map it in pages of this size.
HUGE_PAGE = 2 << 20


class Tier:
    """Slots of one kind of memory. Which are in use is counted here; who uses them is the pager's affair."""

    def __init__(self, name: str, slots: int, page_bytes: int) -> None:
        self.name, self.slots, self.page_bytes = name, slots, page_bytes
        self.peak = 0
        self._free = list(range(slots))

    @property
    def used(self) -> int:
        return self.slots - len(self._free)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free slot, the lowest: so memory that was never needed is never touched."""
        slot = heapq.heappop(self._free)
        self.peak = max(self.peak, self.used)
        return slot

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def grow(self, slots: int) -> None:
        """Have `slots` slots in all."""
        for slot in range(self.slots, slots):
            heapq.heappush(self._free, slot)
        self.slots = max(self.slots, slots)

    def get(self, slot: int, page: int, buffer: Tensor) -> None:
        """Copy a slot into `buffer`, uint8 (page_bytes,) in host memory. `page` is the number of what lies there."""
        raise NotImplementedError

    def put(self, slot: int, page: int, buffer: Tensor) -> None:
        """Copy `buffer` into a slot."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the memory back."""


class MemoryTier(Tier):
    """A tier that arithmetic can be done in: its slots are tensors. Host memory, unless a subclass says otherwise."""

    is_host = True

    def __init__(self, name: str, slots: int, page_bytes: int, *, pinned: bool = False) -> None:
        super().__init__(name, 0, page_bytes)
        self._pinned = pinned
        self._views: list[Tensor] = []
        self.grow(slots)

    def view(self, slot: int) -> Tensor:
        """uint8 (page_bytes,)"""
        return self._views[slot]

    def clear(self, slot: int) -> None:
        self._views[slot].zero_()

    def mark_used(self, slot: int) -> None:
        """The arithmetic on a slot has been asked for: what reads it from here on must come after."""

    def grow(self, slots: int) -> None:
        if slots > self.slots:
            block = self._allocate((slots - self.slots) * self.page_bytes)
            self._views += block.split(self.page_bytes)
        super().grow(slots)

    def close(self) -> None:
        self._views.clear()

    def _allocate(self, size: int) -> Tensor:
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        # Straight from the operating system: aligned to its pages for direct files, zero until it is first touched,
        # which is when it begins to count, and given back whole.
        memory = mmap.mmap(-1, size + HUGE_PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        return whole[start : start + size]


class SimulatedDevice(MemoryTier):
    """Stands for a device that is not there: its own memory, within RAM, with copies that take time and may fail.

    Args:
        bytes_per_second: how fast copies are (None: as fast as they go).
        on_copy: called before every copy with "get" or "put" and the page; may raise, or wait.
    """

    is_host = False

    def __init__(
        self,
        name: str,
        slots: int,
        page_bytes: int,
        *,
        bytes_per_second: float | None = None,
        on_copy: Callable[[str, int], None] = lambda direction, page: None,
    ) -> None:
        super().__init__(name, slots, page_bytes)
        self.bytes_per_second, self.on_copy = bytes_per_second, on_copy

    def get(self, slot: int, page: int, buffer: Tensor) -> None:
        self._transfer("get", page, buffer, self.view(slot))

    def put(self, slot: int, page: int, buffer: Tensor) -> None:
        self._transfer("put", page, self.view(slot), buffer)

    def _transfer(self, direction: str, page: int, to: Tensor, source: Tensor) -> None:
        self.on_copy(direction, page)
        if self.bytes_per_second:
            time.sleep(self.page_bytes / self.bytes_per_second)
        to.copy_(source)


class CudaDevice(MemoryTier):
    """Memory of a CUDA device, copied to and from pinned host memory on two streams, one for each direction.

    A copy waits, on the device, for the arithmetic on its page; the thread that asks for it waits for it, which is
    one of the pager's and not the one that launches the arithmetic. So training never synchronizes with the device,
    and a page said to be there is there.
    """

    is_host = False

    def __init__(self, name: str, slots: int, page_bytes: int, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._used: dict[int, torch.cuda.Event] = {}
        super().__init__(name, slots, page_bytes)

    def mark_used(self, slot: int) -> None:
        event = self._used.setdefault(slot, torch.cuda.Event())
        event.record(torch.cuda.current_stream(self._device))

    def clear(self, slot: int) -> None:
        with self._after_arithmetic(self._inward, slot):
            super().clear(slot)

    def get(self, slot: int, page: int, buffer: Tensor) -> None:
        with self._after_arithmetic(self._outward, slot):
            buffer.copy_(self.view(slot), non_blocking=True)

    def put(self, slot: int, page: int, buffer: Tensor) -> None:
        with self._after_arithmetic(self._inward, slot):
            self.view(slot).copy_(buffer, non_blocking=True)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        super().close()

    @contextlib.contextmanager
    def _after_arithmetic(self, stream: torch.cuda.Stream, slot: int) -> Iterator[None]:
        """Work on a slot in `stream`, done when the block ends."""
        with torch.cuda.stream(stream):
            if slot in self._used:
                stream.wait_event(self._used[slot])
            yield
        stream.synchronize()

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

"""Kinds of memory that pages of optimizer state lie in: host memory, a CUDA device, a simulated device, and a file.

A tier is a fixed number of slots, each the size of a page: that number is its budget, so no instant exists at which
more of it is in use. Tiers are stacked: the first is where the arithmetic happens, and each page moves between
neighbours, of which one is always host memory. So a tier that is not host memory needs two verbs only: `get` copies a
slot into a host buffer, `put` a host buffer into a slot; both return when the data has arrived.
"""

from __future__ import annotations

import contextlib
import heapq
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Memory is taken at multiples of this, so that the system can map it in pages of this size.
HUGE_PAGE = 2 << 20
SECTOR = 512  # bytes: the unit that disks write whole


class PagingError(RuntimeError):
    """Optimizer state could not be moved, or came back changed; the message says which page and where."""


class Tier:
    """Slots of one kind of memory. Which are in use is counted here; who uses them is the pager's affair."""

    def __init__(self, name: str, slots: int, page_bytes: int) -> None:
        self.name, self.slots, self.page_bytes = name, slots, page_bytes
        self.peak = 0
        self._free = list(range(slots))

    @property
    def used(self) -> int:
        """The number of slots in use."""
        return self.slots - len(self._free)

    @property
    def free(self) -> int:
        """The number of slots that nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """A free slot, the lowest: so memory that was never needed is never touched."""
        slot = heapq.heappop(self._free)
        self.peak = max(self.peak, self.used)
        return slot

    def give_back(self, slot: int) -> None:
        """Free a slot."""
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
        """Fill a slot with zeros."""
        self._views[slot].zero_()

    def mark_used(self, slot: int) -> None:
        """The arithmetic on a slot has been asked for: what reads it from here on must come after."""

    def grow(self, slots: int) -> None:
        if slots > self.slots:
            more = slots - self.slots
            for pages in pinned_pieces(more, self.page_bytes) if self._pinned else [more]:
                self._views += self._allocate(pages * self.page_bytes).split(self.page_bytes)
        super().grow(slots)

    def close(self) -> None:
        self._views.clear()

    def _allocate(self, size: int) -> Tensor:
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        # Straight from the operating system: aligned to its pages for direct files, zero until it is first touched,
        # which is when it begins to count, and given back whole.
        # Private: a process that is forked has a copy of its own, as of any tensor; what Python maps is shared with it.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size + HUGE_PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        return whole[start : start + size]


def pinned_pieces(pages: int, page_bytes: int) -> list[int]:
    """So many pages in pieces that fill powers of two bytes: PyTorch takes such for any pinned memory, or the next.

    In one piece, 33 GB of a budget would take 64 GB of the machine's memory.
    """
    pieces = []
    while pages:
        room = 1 << (page_bytes - 1).bit_length()
        while 2 * room // page_bytes <= pages:
            room *= 2
        pieces.append(room // page_bytes)
        pages -= pieces[-1]
    return pieces


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
        event = self._used.get(slot)
        if event is None:
            event = self._used[slot] = torch.cuda.Event()
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
        if not torch.cuda._is_in_bad_fork():
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


class SpillFile(Tier):
    """The last tier: a private file of `slots` pages in `directory`.

    The file belongs to this process alone. It is created readable by its owner only, and unlinked as soon as it is
    open, so it has no name that anyone could open, and the operating system removes it however the process ends. All
    its room is allocated at once: a disk that is too small is known before training, not in the middle of a step.
    Every page has a checksum, kept in memory; so a page that comes back changed (a failing disk, a lost write) is an
    error and not a wrong update. The file is read and written around the operating system's cache where the file
    system can (O_DIRECT), so that a memory budget is not quietly exceeded by cached pages.

    Raises:
        PagingError: the file cannot be created, or there is no room for it.
    """

    def __init__(self, name: str, slots: int, page_bytes: int, directory: str | Path) -> None:
        super().__init__(name, 0, page_bytes)
        self.directory = Path(directory)
        self._handle = -1
        self._handle, self.direct = _open_private(self.directory)
        self._checksums: dict[int, int] = {}
        try:
            self.grow(slots)
        except BaseException:
            self.close()
            raise

    def grow(self, slots: int) -> None:
        if slots > self.slots:
            size = slots * self.page_bytes
            try:
                os.posix_fallocate(self._handle, 0, size)
            except OSError as error:
                free = os.statvfs(self.directory)
                raise PagingError(
                    f"cannot have {size:,} bytes in spill_dir {self.directory} for optimizer state: "
                    f"{error.strerror}; {free.f_bavail * free.f_frsize:,} bytes are free there"
                ) from error
        super().grow(slots)

    def put(self, slot: int, page: int, buffer: Tensor) -> None:
        data = _memory_of(buffer)
        self._checksums[slot] = _checksum(data)
        self._transfer(os.pwrite, "write", slot, page, data)

    def get(self, slot: int, page: int, buffer: Tensor) -> None:
        data = _memory_of(buffer)
        self._transfer(_read_into, "read", slot, page, data)
        if _checksum(data) != self._checksums[slot]:
            raise PagingError(f"{self._page(slot, page)} is corrupt: its checksum is not that of what was written")

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _transfer(
        self, call: Callable[[int, memoryview, int], int], verb: str, slot: int, page: int, data: memoryview
    ) -> None:
        """Read or write a page, in as many pieces as the system makes of it."""
        done = 0
        while done < len(data):
            try:
                count = call(self._handle, data[done:], slot * self.page_bytes + done)
            except OSError as error:
                raise PagingError(f"cannot {verb} {self._page(slot, page)}: {error.strerror}") from error
            if count <= 0:
                raise PagingError(f"cannot {verb} {self._page(slot, page)}: it ends after {done} of {len(data)} bytes")
            done += count

    def _page(self, slot: int, page: int) -> str:
        place = f"at byte {slot * self.page_bytes:,} of the spill file in {self.directory}"
        return f"page {page} of the optimizer state, {place}"


def _open_private(directory: Path) -> tuple[int, bool]:
    """A new file without a name, and whether it goes around the cache."""
    try:
        handle, name = tempfile.mkstemp(dir=directory, prefix="minipeft-optimizer-", suffix=".spill")
    except OSError as error:
        raise PagingError(f"cannot create a file in spill_dir {directory}: {error.strerror}") from error
    direct = False
    try:
        flag = getattr(os, "O_DIRECT", 0)
        if flag:
            # Some file systems refuse it: tmpfs, some network ones.
            with contextlib.suppress(OSError):
                unbuffered = os.open(name, os.O_RDWR | os.O_CLOEXEC | flag)
                os.close(handle)
                handle, direct = unbuffered, True
    finally:
        os.unlink(name)
    return handle, direct


def _checksum(data: memoryview) -> int:
    """CRC-32 of the sums of the sectors: six times as fast as that of the bytes (23 against 3.8 GB/s, one core).

    What disks do to data changes a sum (a bit, a sector of zeros or of something else) or the order of the sums.
    """
    sums = np.add.reduce(np.frombuffer(data, dtype=np.uint64).reshape(-1, SECTOR // 8), axis=1)
    return zlib.crc32(sums.data)


def _memory_of(buffer: Tensor) -> memoryview:
    assert buffer.dtype == torch.uint8 and buffer.is_contiguous()
    return buffer.numpy().data


def _read_into(handle: int, data: memoryview, offset: int) -> int:
    return os.preadv(handle, [data], offset)

"""The last tier: pages of optimizer state in a file.

The file belongs to this process alone. It is created readable by its owner only, and unlinked as soon as it is open,
so it has no name that anyone could open, and the operating system removes it however the process ends. All its room
is allocated at once: a disk that is too small is known before training, not in the middle of a step. Every page has a
checksum, kept in memory; so a page that comes back other than it went (a failing disk, a write that was lost) is an
error and not a wrong update. The file is read and written around the operating system's cache where the file system
can (O_DIRECT), so that a memory budget is not quietly exceeded by cached pages.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minipeft.optim.errors import PagingError
from minipeft.optim.tiers import Tier

SECTOR = 512  # bytes: the unit that disks write whole


class SpillFile(Tier):
    """A private file of `slots` pages in `directory`.

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

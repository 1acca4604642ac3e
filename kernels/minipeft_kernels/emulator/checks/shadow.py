"""State beside memory, a cell for a few bytes: what the checks remember of every byte."""

from __future__ import annotations

import numpy as np


def cells(starts: np.ndarray, size: int, granule: int) -> np.ndarray:
    """(n, size / granule) cells of accesses of `size` bytes that start at byte offsets `starts`."""
    first = starts // granule
    count = max(1, size // granule)
    return first[:, None] + np.arange(count) if count > 1 else first[:, None]


class SharedOffsets:
    """The places of the bytes of the blocks' shared memories in one array of a batch."""

    def __init__(self, blocks: int, shared_bytes: int, threads: int, base: int) -> None:
        self.stride = -(-max(shared_bytes, 1) // 16) * 16
        self.size = blocks * self.stride
        self.threads, self.base = threads, base

    def of(self, lanes: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Byte offsets of addresses in the lanes' blocks."""
        return lanes // self.threads * self.stride + (addresses - self.base)

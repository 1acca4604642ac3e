"""Output buffers that show what a kernel did not write, and what it wrote beside them."""

from typing import Any

import torch
from torch import Tensor

GUARD = 256
PATTERN = 0xA5


class Guarded:
    """A contiguous buffer full of NaN (integers: of ones), with guard bytes before and after it.

    Attributes:
        out: the buffer, of the shape asked for.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> None:
        """`offset`: elements by which the buffer lies off the alignment of an allocation."""
        size = torch.Size(shape).numel() * dtype.itemsize
        self._start = GUARD + offset * dtype.itemsize
        self._bytes = torch.full((self._start + size + GUARD,), PATTERN, dtype=torch.uint8)
        self._end = self._start + size
        inner = self._bytes[self._start : self._end]
        inner.fill_(0xFF)
        self.out: Tensor = inner.view(dtype).view(shape)
        if dtype.is_floating_point:
            assert self.out.isnan().all()

    def check(self) -> Tensor:
        """The buffer, after making sure that everything in it was written and nothing outside."""
        assert (self._bytes[: self._start] == PATTERN).all() and (self._bytes[self._end :] == PATTERN).all()
        if self.out.is_floating_point():
            assert not self.out.isnan().any()
        return self.out


def strided(t: Tensor) -> Tensor:
    """The same values in every second element of a larger buffer that starts at an odd place."""
    wide = torch.full((2 * t.numel() + 1,), 7, dtype=t.dtype)
    out: Any = wide[1::2][: t.numel()]
    out.copy_(t.reshape(-1))
    return out.as_strided(t.shape, [2 * s for s in t.contiguous().stride()])

"""The address space of the optimizer's state: pages of one size, shared by many parameters.

    page 0                              page 1
    | m v of a bias | m v of a matrix ] [ the matrix, continued | m v of the next |   free ]

A parameter's state is a list of segments, each wholly within a page: elements [start, stop) of the parameter, its
first and second moment side by side, so that a page holds all that the update of those elements needs. Where a page
lies (device, host memory, disk) is the pager's affair; nothing here holds any data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Fields start at multiples of this, for vector instructions.
ALIGNMENT = 64
# Pages are multiples of this: files are read and written around the operating system's cache in such units.
PAGE_UNIT = 4096


@dataclass(frozen=True)
class Field:
    """One array of a segment: `name`, its dtype, and how many elements of the parameter share one entry of it."""

    name: str
    dtype: torch.dtype
    per: int = 1

    def count(self, elements: int) -> int:
        """The entries of the field for so many elements."""
        return -(-elements // self.per)

    def bytes(self, elements: int) -> int:
        """The bytes of the field for so many elements, rounded up to `ALIGNMENT`."""
        size = self.count(elements) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class StateLayout:
    """The arrays that make the state of a parameter, and in which multiples of elements it may be divided."""

    fields: tuple[Field, ...]
    quantum: int

    def bytes(self, elements: int) -> int:
        """The bytes of all fields for so many elements."""
        return sum(field.bytes(elements) for field in self.fields)

    def elements_within(self, size: int) -> int:
        """The most elements, a multiple of the quantum, whose state takes no more than `size` bytes."""
        per_quantum = sum(self.quantum * field.dtype.itemsize / field.per for field in self.fields)
        quanta = int(size / per_quantum)
        while self.bytes(quanta * self.quantum) > size:
            quanta -= 1
        return quanta * self.quantum


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, stop) of a parameter, whose state lies in `page` from byte `offset` on; `whole`: all of them."""

    parameter: int
    start: int
    stop: int
    page: int
    offset: int
    whole: bool

    def views(self, page: Tensor, layout: StateLayout) -> tuple[Tensor, ...]:
        """The fields within `page`, uint8 (page_bytes,), sharing its memory."""
        elements, offset, views = self.stop - self.start, self.offset, []
        for field in layout.fields:
            size = field.count(elements) * field.dtype.itemsize
            views.append(page[offset : offset + size].view(field.dtype))
            offset += field.bytes(elements)
        return tuple(views)


class PageTable:
    """The page of every segment of state. Parameters are numbered in the order in which they were added."""

    def __init__(self, layout: StateLayout, page_bytes: int) -> None:
        self.layout, self.page_bytes = layout, page_bytes
        self.of_page: list[list[Segment]] = []
        self.of_parameter: list[list[Segment]] = []
        self._filled = page_bytes

    def __len__(self) -> int:
        return len(self.of_page)

    @property
    def state_bytes(self) -> int:
        """Bytes of state proper: without the free ends of pages."""
        segments = (segment for page in self.of_page for segment in page)
        return sum(self.layout.bytes(segment.stop - segment.start) for segment in segments)

    def add(self, elements: int) -> int:
        """Give a parameter of so many elements its place; returns its number."""
        number = len(self.of_parameter)
        self.of_parameter.append(list(self._place(number, elements)))
        return number

    def _place(self, number: int, elements: int) -> Iterator[Segment]:
        start = 0
        while start < elements:
            room = self.page_bytes - self._filled
            whole = self.layout.bytes(elements - start) <= room
            count = elements - start if whole else self.layout.elements_within(room)
            if count == 0:
                self.of_page.append([])
                self._filled = 0
                continue
            segment = Segment(number, start, start + count, len(self.of_page) - 1, self._filled, count == elements)
            self.of_page[-1].append(segment)
            self._filled += self.layout.bytes(count)
            start += count
            yield segment


_BITS_8 = (
    *(Field("exp_avg_codes", torch.uint8), Field("exp_avg_absmax", torch.float32, per=256)),
    *(Field("exp_avg_sq_codes", torch.uint8), Field("exp_avg_sq_absmax", torch.float32, per=256)),
)
LAYOUTS = {
    # Divided at multiples of 64 elements, so that vector loops meet no ragged end within a parameter and the numbers
    # do not depend on where pages end.
    32: StateLayout((Field("exp_avg", torch.float32), Field("exp_avg_sq", torch.float32)), quantum=64),
    # Blocks of 256 share a scale: pages end between blocks.
    8: StateLayout(_BITS_8, quantum=256),
}

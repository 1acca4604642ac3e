"""The emulated GPU's global memory: tensors bound at device addresses, nothing between them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

# The numpy dtype that a value of so many bytes is kept in. complex128 is numpy's only plain type of 16 bytes.
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Fault(Exception):
    """An access that memory refuses: `position` in the arrays of the access, and why."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        self.reason = reason


@dataclass(eq=False)
class Buffer:
    """A tensor's bytes at device addresses [start, end). written: (bytes,) bool, which have been; None for all."""

    name: str
    data: np.ndarray
    start: int
    written: np.ndarray | None
    words: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.end = self.start + self.data.size
        for size, word in WORDS.items():
            if self.start % size == 0:
                whole = self.data.size // size * size
                self.words[size] = self.data[:whole].view(word)


class Memory:
    """Device addresses to bytes.

    Accesses are vectors: one address a lane. An access that does not lie in one tensor whole, or whose address is no
    multiple of its size, raises `Fault`, which the machine turns into an `AccessError` with the thread.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._starts: list[int] = []
        self._recent: Buffer | None = None

    def bind(self, name: str, array: np.ndarray, address: int, initialized: bool | np.ndarray = True) -> Buffer:
        """Put a tensor at a device address.

        Args:
            name: for messages. array: uint8, one-dimensional and contiguous: a view of the tensor's bytes, written in
                place. address: of its first byte, as the kernel's arguments have it; two tensors should lie apart, so
                that running out of one is not running into the next. initialized: False for memory that a
                kernel must write before it reads it; or (bytes,) bool, which bytes hold something already, which
                `checks.Uninitialized` keeps up to date.

        Raises:
            TypeError, ValueError: array is not as said, or overlaps one that is bound.
        """
        if array.dtype != np.uint8 or array.ndim != 1 or not array.flags.c_contiguous:
            raise TypeError(f"{name}: array must be one-dimensional contiguous uint8, got {array.ndim}-d {array.dtype}")
        at = bisect_right(self._starts, address)
        if isinstance(initialized, np.ndarray) and (initialized.shape != array.shape or initialized.dtype != bool):
            raise ValueError(f"{name}: initialized must be {array.size} bools, got {initialized.dtype}")
        some = initialized if isinstance(initialized, np.ndarray) else np.zeros(array.size, bool)
        buffer = Buffer(name, array, address, None if initialized is True else some)
        for other in self.buffers[max(0, at - 1) : at + 1]:
            if other.start < buffer.end and buffer.start < other.end:
                raise ValueError(
                    f"{name} at [{buffer.start:#x}, {buffer.end:#x}) overlaps {other.name} at "
                    f"[{other.start:#x}, {other.end:#x})"
                )
        self.buffers.insert(at, buffer)
        self._starts.insert(at, address)
        return buffer

    def find(self, address: int) -> Buffer | None:
        """The tensor that holds the byte at `address`."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self.buffers[at].end:
            return self.buffers[at]
        return None

    def describe(self, address: int) -> str:
        """An address in words: the tensor and the byte in it, or the nearest tensor."""
        found = self.find(address)
        if found is not None:
            return f"byte {address - found.start} of {found.name} ({found.data.size} bytes)"
        if not self.buffers:
            return f"address {address:#x}, and no tensor is bound"
        near = min(self.buffers, key=lambda b: b.start - address if address < b.start else address - b.end + 1)
        if address < near.start:
            return f"{near.start - address} bytes before {near.name} ({near.data.size} bytes)"
        return f"byte {address - near.start} of {near.name}, which has {near.data.size} bytes"

    def parts(self, addresses: np.ndarray, size: int) -> list[tuple[Buffer, np.ndarray | None]]:
        """The tensors that an access touches, with the positions of the lanes in each; None for all.

        Args:
            addresses: (n,) int64, n > 0. size: bytes a lane.

        Raises:
            Fault: an address is misaligned, or its bytes are not in one tensor.
        """
        low, high = int(addresses.min()), int(addresses.max())
        if size > 1:
            misaligned = np.bitwise_or.reduce(addresses) & (size - 1)
            if misaligned:
                self._refuse_misaligned(addresses, size)
        buffer = self._recent
        if buffer is not None and buffer.start <= low and high + size <= buffer.end:
            return [(buffer, None)]
        buffer = self._recent = self.find(low)
        if buffer is not None and high + size <= buffer.end:
            return [(buffer, None)]
        return self._scattered(addresses, size)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n,) values of `size` bytes, as WORDS has them. Raises `Fault`."""
        parts = self.parts(addresses, size)
        if parts[0][1] is None:
            return _take(parts[0][0], addresses, size)
        values: np.ndarray = np.empty(addresses.size, WORDS[size])
        for buffer, positions in parts:
            values[positions] = _take(buffer, addresses[positions], size)
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write (n,) values of a type of WORDS; of two lanes with one address the later wins. Raises `Fault`."""
        size = values.dtype.itemsize
        for buffer, positions in self.parts(addresses, size):
            if positions is None:
                _put(buffer, addresses, values, size)
            else:
                _put(buffer, addresses[positions], values[positions], size)

    def _scattered(self, addresses: np.ndarray, size: int) -> list[tuple[Buffer, np.ndarray | None]]:
        starts = np.array(self._starts, np.int64)
        owner = np.searchsorted(starts, addresses, side="right") - 1
        parts: list[tuple[Buffer, np.ndarray | None]] = []
        for index in np.unique(owner):
            positions = np.flatnonzero(owner == index)
            buffer = self.buffers[index] if index >= 0 else None
            outside = positions if buffer is None else positions[addresses[positions] + size > buffer.end]
            if outside.size:
                position = int(outside[0])
                where = self.describe(int(addresses[position]))
                raise Fault(position, f"{size} bytes are accessed out of bounds, at {where}")
            assert buffer is not None
            parts.append((buffer, positions))
        return parts

    def _refuse_misaligned(self, addresses: np.ndarray, size: int) -> None:
        position = int(np.flatnonzero(addresses & (size - 1))[0])
        where = self.describe(int(addresses[position]))
        raise Fault(position, f"{size} bytes are accessed at an address that is no multiple of {size}: {where}")


def _take(buffer: Buffer, addresses: np.ndarray, size: int) -> np.ndarray:
    offsets = addresses - buffer.start
    words = buffer.words.get(size)
    if words is not None:
        return words[offsets // size] if size > 1 else words[offsets]
    # The tensor itself does not start at a multiple of the size.
    return buffer.data[offsets[:, None] + np.arange(size)].view(WORDS[size])[:, 0]


def _put(buffer: Buffer, addresses: np.ndarray, values: np.ndarray, size: int) -> None:
    offsets = addresses - buffer.start
    words = buffer.words.get(size)
    if words is not None:
        words[offsets // size] = values
    else:
        buffer.data[offsets[:, None] + np.arange(size)] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)

"""Finds reads of bytes that nothing has written."""

from __future__ import annotations

import numpy as np

from ..errors import UninitializedError
from ..memory import Buffer
from ..observer import Batch, Launch, Observer
from ..parse import SHARED_BASE
from ..program import Instruction
from .shadow import SharedOffsets, cells


class Uninitialized(Observer):
    """Raises UninitializedError for a read of a tensor bound with `initialized=False`, or of shared memory, where no
    store, atomic or delivered copy has written every byte before.

    What was written is kept with the tensor (`Buffer.written`): it counts in the next launch on the same memory.
    """

    def begin(self, launch: Launch) -> None:
        """Look whether any tensor of the launch has unwritten bytes."""
        self.launch = launch
        self.needed = any(b.written is not None for b in launch.memory.buffers)

    def begin_batch(self, batch: Batch) -> None:
        """Start with shared memory that nobody has written."""
        self.batch = batch
        self.offsets = SharedOffsets(batch.blocks, self.launch.all_shared_bytes, batch.threads, SHARED_BASE)
        self.shared_written = np.zeros(self.offsets.size, bool)

    def global_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Require written bytes of reads; note the bytes that are written."""
        if not self.needed or not lanes.size:
            return
        for buffer, positions in self.launch.memory.parts(addresses, size):
            shadow = buffer.written
            if shadow is None:
                continue
            some = slice(None) if positions is None else positions
            bytes_ = cells(addresses[some] - buffer.start, size, 1)
            if kind != "store":
                self._require(shadow, bytes_, instruction, lanes[some], buffer)
            if kind in ("store", "atomic"):
                shadow[bytes_] = True

    def shared_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Require written bytes of reads; note the bytes that are written."""
        if kind == "async":
            return
        bytes_ = cells(self.offsets.of(lanes, addresses), size, 1)
        if kind in ("load", "matrix", "atomic"):
            self._require(self.shared_written, bytes_, instruction, lanes, None)
        if kind != "load" and kind != "matrix":
            self.shared_written[bytes_] = True

    def _require(
        self, shadow: np.ndarray, bytes_: np.ndarray, instruction: Instruction, lanes: np.ndarray, buffer: Buffer | None
    ) -> None:
        there = shadow[bytes_]
        if there.all():
            return
        position, byte = np.argwhere(~there)[0]
        offset = int(bytes_[position, byte])
        if buffer is None:
            where = f"byte {offset % self.offsets.stride} of shared memory"
        else:
            where = f"byte {offset} of {buffer.name} ({buffer.data.size} bytes)"
        raise UninitializedError(
            f"{where} is read before anything was written there; by {self.batch.describe(int(lanes[position]))}, at "
            f"{instruction.place}"
        )

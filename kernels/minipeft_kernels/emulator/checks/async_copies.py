"""Finds uses of shared memory that an asynchronous copy is still to write."""

from __future__ import annotations

import numpy as np

from ..errors import AsyncCopyError
from ..observer import Batch, Launch, Observer
from ..parse import SHARED_BASE
from ..program import Instruction
from .shadow import SharedOffsets, cells

# Copies have 4, 8 or 16 bytes.
_GRANULE = 4


class AsyncCopies(Observer):
    """Raises AsyncCopyError where bytes are read or written between a cp.async to them and the wait that delivers it,
    and for two copies on their way to the same bytes."""

    def begin(self, launch: Launch) -> None:
        """Remember the launch."""
        self.launch = launch

    def begin_batch(self, batch: Batch) -> None:
        """Start with no copy on its way."""
        self.batch = batch
        self.offsets = SharedOffsets(batch.blocks, self.launch.all_shared_bytes, batch.threads, SHARED_BASE)
        # The instruction whose copy is under way, -1 for none.
        self.pending = np.full(-(-self.offsets.size // _GRANULE), -1, np.int32)

    def shared_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Note the copies that start and arrive, and raise if another access meets one that is on its way."""
        touched = cells(self.offsets.of(lanes, addresses), size, _GRANULE)
        if kind == "arrive":
            self.pending[touched] = -1
            return
        under_way = self.pending[touched] >= 0
        if under_way.any():
            position, cell = np.argwhere(under_way)[0]
            self._refuse(instruction, kind, int(lanes[position]), int(touched[position, cell]))
        if kind == "async":
            self.pending[touched] = instruction.index

    def _refuse(self, instruction: Instruction, kind: str, lane: int, cell: int) -> None:
        copy = self.launch.program.instructions[int(self.pending[cell])]
        verb = {"store": "written", "async": "the target of a second copy"}.get(kind, "read")
        raise AsyncCopyError(
            f"byte {cell * _GRANULE % self.offsets.stride} of shared memory is {verb} while {copy.place} is still to "
            f"write it (no cp.async.wait_group has waited for it); by {self.batch.describe(lane)}, at "
            f"{instruction.place}"
        )

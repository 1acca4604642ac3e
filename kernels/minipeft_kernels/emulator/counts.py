"""Counts of a launch: instructions by class and line, sectors, wavefronts, bytes by tensor, tensor operations.

Everything is counted as a warp executes it, not a thread: an instruction that one lane of a warp executes takes the
same slot as one that all 32 do. `Counter` watches a run; `Counts` is the result, which can be added up and scaled.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .classes import class_of, tensor_flops
from .memory import Buffer
from .observer import Batch, Launch, Observer
from .program import Instruction, Program
from .traffic import LANES, SECTOR, sectors, wavefronts


def _zeros() -> dict[Any, float]:
    return defaultdict(float)


@dataclass
class Access:
    """Accesses of warps to one kind of memory.

    Attributes:
        requests: executed by a warp. transactions: sectors (global) or wavefronts (shared) that they take; least: the
            fewest that the same bytes fit in. bytes: that lanes ask for, the same byte as often as it is asked for.
    """

    requests: float = 0
    transactions: float = 0
    least: float = 0
    bytes: float = 0

    @property
    def efficiency(self) -> float:
        """The least possible over what it takes: 1 is coalesced, or free of bank conflicts."""
        return self.least / self.transactions if self.transactions else 1.0

    def add(self, other: Access, factor: float = 1) -> None:
        """Add another's numbers, times a factor."""
        self.requests += other.requests * factor
        self.transactions += other.transactions * factor
        self.least += other.least * factor
        self.bytes += other.bytes * factor


@dataclass
class TensorBytes:
    """Bytes of one tensor, which has `size`: as lanes ask for them, in sectors as they move, and each byte once."""

    size: int = 0
    read: float = 0
    written: float = 0
    sector_bytes_read: float = 0
    sector_bytes_written: float = 0
    unique_read: float = 0
    unique_written: float = 0

    def scale(self, factor: float) -> None:
        """Multiply all; no more bytes are touched than there are."""
        self.read *= factor
        self.written *= factor
        self.sector_bytes_read *= factor
        self.sector_bytes_written *= factor
        self.unique_read = min(self.size, self.unique_read * factor)
        self.unique_written = min(self.size, self.unique_written * factor)


@dataclass
class Counts:
    """Of one launch.

    Attributes:
        blocks: of the grid. executed: of them, those that were run; if fewer, all sums are scaled up to the grid.
        warps: of a block.
        instructions: warp instructions by class. lines: by (file, line) of the Python they come from.
        mnemonics: by instruction, such as "prmt.b32".
        lanes: thread instructions; divided by 32 warp instructions, how full warps are.
        tensor_flops: operations in matrix products.
        global_load, global_store, global_atomic, shared_load, shared_store: memory.
        tensors: bytes by tensor.
    """

    blocks: int = 0
    executed: int = 0
    warps: int = 0
    instructions: dict[str, float] = field(default_factory=_zeros)
    lines: dict[tuple[str, int], float] = field(default_factory=_zeros)
    mnemonics: dict[str, float] = field(default_factory=_zeros)
    lanes: float = 0
    tensor_flops: float = 0
    global_load: Access = field(default_factory=Access)
    global_store: Access = field(default_factory=Access)
    global_atomic: Access = field(default_factory=Access)
    shared_load: Access = field(default_factory=Access)
    shared_store: Access = field(default_factory=Access)
    tensors: dict[str, TensorBytes] = field(default_factory=dict)

    @property
    def issued(self) -> float:
        """Warp instructions, moves left out: the assembler renames those away."""
        return sum(count for name, count in self.instructions.items() if name != "move")

    @property
    def unique_bytes(self) -> float:
        """Bytes read plus bytes written, each once: what DRAM moves at least, if the caches forget nothing."""
        return sum(t.unique_read + t.unique_written for t in self.tensors.values())

    def scale(self, factor: float) -> None:
        """Multiply every number, to make the counts of some blocks those of the grid."""
        tallies: tuple[dict[Any, float], ...] = (self.instructions, self.lines, self.mnemonics)
        for tally in tallies:
            for key in tally:
                tally[key] *= factor
        self.lanes *= factor
        self.tensor_flops *= factor
        for name in ("global_load", "global_store", "global_atomic", "shared_load", "shared_store"):
            scaled = Access()
            scaled.add(getattr(self, name), factor)
            setattr(self, name, scaled)
        for tensor in self.tensors.values():
            tensor.scale(factor)


class Counter(Observer):
    """Counts one launch; `counts` is complete when the run is."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._issued = np.zeros(0, np.int64)
        self._lanes = np.zeros(0, np.int64)
        self._program: Program | None = None
        self._touched: dict[tuple[str, bool], np.ndarray] = {}

    def begin(self, launch: Launch) -> None:
        """Start from zero for a launch."""
        self._program = launch.program
        self._memory = launch.memory
        self._issued = np.zeros(len(launch.program.instructions), np.int64)
        self._lanes = np.zeros_like(self._issued)
        self.counts.blocks = launch.blocks
        self.counts.warps = -(-launch.threads // LANES)

    def begin_batch(self, batch: Batch) -> None:
        """Count the blocks that are executed."""
        self.counts.executed += batch.blocks

    def instruction(self, instruction: Instruction, lanes: np.ndarray, issued: np.ndarray) -> None:
        """Count a warp instruction for each warp that issues it, and the lanes that execute it."""
        # A warp whose lanes are all masked off takes its slot all the same.
        self._issued[instruction.index] += _warps(issued)
        self._lanes[instruction.index] += lanes.size

    def global_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Count the sectors of an access to global memory, and its bytes by tensor."""
        if not lanes.size:
            return
        others = {"store": self.counts.global_store, "atomic": self.counts.global_atomic}
        access = others.get(kind, self.counts.global_load)
        warps, grouped, active = by_warp(lanes, addresses)
        taken, least = sectors(grouped, size, active)
        access.add(Access(warps, taken, least, size * lanes.size))
        for buffer, positions in self._memory.parts(addresses, size):
            at = slice(None) if positions is None else positions
            self._count_tensor(buffer, kind, addresses[at], size, *by_warp(lanes[at], addresses[at])[1:])

    def shared_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Count the wavefronts of an access to shared memory."""
        # The copy's bytes arrive once, whichever way they are told; what tensor cores read by descriptor is their own.
        if not lanes.size or kind in ("async", "matrix"):
            return
        access = self.counts.shared_load if kind == "load" else self.counts.shared_store
        warps, grouped, active = by_warp(lanes, addresses)
        taken, least = wavefronts(grouped, size, active)
        access.add(Access(warps, taken, least, size * lanes.size))

    def finish(self) -> None:
        """Sum up by class, mnemonic, line and tensor, scaled from the blocks that were executed to all."""
        assert self._program is not None
        counts = self.counts
        for instruction, issued, lanes in zip(self._program.instructions, self._issued, self._lanes, strict=True):
            if not issued:
                continue
            number = int(issued)
            counts.instructions[class_of(instruction)] += number
            counts.mnemonics[instruction.mnemonic] += number
            if instruction.source is not None:
                counts.lines[instruction.source] += number
            counts.tensor_flops += tensor_flops(instruction) * number
            counts.lanes += int(lanes)
        for (name, written), touched in self._touched.items():
            unique = int(np.count_nonzero(touched))
            tensor = counts.tensors[name]
            if written:
                tensor.unique_written = unique
            else:
                tensor.unique_read = unique
        if counts.executed < counts.blocks:
            counts.scale(counts.blocks / counts.executed)

    def _count_tensor(
        self, buffer: Buffer, kind: str, addresses: np.ndarray, size: int, grouped: np.ndarray, active: np.ndarray
    ) -> None:
        tensor = self.counts.tensors.setdefault(buffer.name, TensorBytes(buffer.data.size))
        moved = SECTOR * sectors(grouped, size, active)[0]
        if kind in ("load", "async", "atomic"):
            tensor.read += size * addresses.size
            tensor.sector_bytes_read += moved
            self._touch(buffer, False, addresses, size)
        if kind in ("store", "atomic"):
            tensor.written += size * addresses.size
            tensor.sector_bytes_written += moved
            self._touch(buffer, True, addresses, size)

    def _touch(self, buffer: Buffer, written: bool, addresses: np.ndarray, size: int) -> None:
        key = (buffer.name, written)
        touched = self._touched.get(key)
        if touched is None:
            touched = self._touched[key] = np.zeros(buffer.data.size, np.bool_)
        offsets = addresses - buffer.start
        for i in range(size):
            touched[offsets + i] = True


def by_warp(lanes: np.ndarray, addresses: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """(number of warps, addresses (warps, 32), bool (warps, 32)) of ascending lanes with an address each."""
    warp = lanes // LANES
    first = np.ones(len(warp), np.bool_)
    first[1:] = warp[1:] != warp[:-1]
    row = np.cumsum(first) - 1
    count = int(row[-1]) + 1 if len(row) else 0
    grouped = np.zeros((count, LANES), np.int64)
    active = np.zeros((count, LANES), np.bool_)
    grouped[row, lanes % LANES] = addresses
    active[row, lanes % LANES] = True
    return count, grouped, active


def _warps(lanes: np.ndarray) -> int:
    """The number of warps that ascending lanes belong to."""
    if not lanes.size:
        return 0
    warp = lanes // LANES
    return 1 + int(np.count_nonzero(warp[1:] != warp[:-1]))

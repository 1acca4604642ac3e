"""Observers, which watch a run: counts, profiles and checks are such."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import Memory
from .parse import SHARED_BASE
from .program import Instruction, Program


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: `grid` blocks of `threads` threads with `shared_bytes` of shared memory each."""

    program: Program
    memory: Memory
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def all_shared_bytes(self) -> int:
        """Of a block: the program's variables and what the launch adds."""
        ends = (v.address + v.size for v in self.program.shared.values())
        return max(ends, default=SHARED_BASE) - SHARED_BASE + self.shared_bytes

    def place(self, block: int) -> tuple[int, int, int]:
        """(x, y, z) of a block by its linear index."""
        width, height, _ = self.grid
        return block % width, block // width % height, block // (width * height)


@dataclass(frozen=True)
class Batch:
    """Blocks that run side by side. Lanes are numbered block by block, thread by thread, from 0.

    Attributes:
        indices: (blocks,) linear index of each block in the grid, x fastest. launch: that they are of.
        registers: name -> (lanes,) array, the emulator's own: values as they are before the instruction that a hook is
            about.
    """

    indices: np.ndarray
    launch: Launch
    registers: dict[str, np.ndarray]

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.indices.size

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.launch.threads

    @property
    def lanes(self) -> int:
        """Threads of the batch."""
        return self.blocks * self.threads

    def block_of(self, lanes: np.ndarray) -> np.ndarray:
        """Linear index in the grid of each lane's block."""
        return self.indices[lanes // self.threads]

    def describe(self, lane: int) -> str:
        """A lane in words: its block and thread."""
        block, thread = divmod(lane, self.threads)
        place = self.launch.place(int(self.indices[block]))
        return f"block {place}, thread {thread} (warp {thread // 32}, lane {thread % 32})"


class Observer:
    """Override what is of interest: a hook that is not overridden costs nothing.

    `lanes` are always the lanes that execute, ascending, guards already applied, (n,) int64; `addresses` (n,) int64 go
    with them. Hooks are called before the instruction takes effect. An observer that raises stops the run.
    """

    def begin(self, launch: Launch) -> None:
        """Before the first block."""

    def begin_batch(self, batch: Batch) -> None:
        """Before the blocks of a batch, which the following hooks are about."""

    def instruction(self, instruction: Instruction, lanes: np.ndarray, issued: np.ndarray) -> None:
        """An instruction is executed by `lanes`, which may be none. issued: with those whose guard is false."""

    def global_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Global memory is touched: kind "load", "store", "atomic", or "async" for the source of an asynchronous copy;
        `size` bytes a lane, all elements of a vector together."""

    def shared_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Shared memory is touched, by addresses in the block: kind "load", "store", "atomic", "async" when a copy to
        it is started, "arrive" when that copy's bytes are written, "matrix" for what tensor cores read by descriptor
        (lanes: the first of each warpgroup's, repeated)."""

    def barrier(self, instruction: Instruction, lanes: np.ndarray, whole: bool) -> None:
        """Threads pass a barrier of their block together, or arrive without waiting: `lanes` are all that take part,
        `whole` if those are all threads of their blocks. Called when the last has arrived."""

    def stored(
        self, instruction: Instruction, space: str, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray
    ) -> None:
        """After the `global_access` or `shared_access` of a store: what it is about to write, (n,) words; space is
        "global" or "shared"."""

    def finish(self) -> None:
        """After the last block."""

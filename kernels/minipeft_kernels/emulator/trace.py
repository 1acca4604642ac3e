"""A record of one thread, instruction by instruction, with the values that it gets: for reading, and for lessons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .observer import Batch, Observer
from .program import Address, Instruction, Not, Operand, Pair, Register, Vector

# Whose first operand is no result.
_NO_RESULT = ("st", "bra", "bar", "barrier", "ret", "exit", "cp", "red", "membar", "fence", "stmatrix", "mbarrier")


@dataclass
class Entry:
    """An instruction that the thread executed.

    Attributes:
        instruction: it. values: bits of its registers before, results after it; by the register's name.
        address: of a load, a store or a copy from global memory, in that memory; None for others.
    """

    instruction: Instruction
    before: dict[str, int]
    results: dict[str, int] = field(default_factory=dict)
    address: int | None = None

    @property
    def sources(self) -> list[str]:
        """Registers that it reads."""
        written = results_of(self.instruction)
        return [name for name in self.before if name not in written or _is_read_too(self.instruction, name)]


class Trace(Observer):
    """Records what one thread executes.

    Args:
        thread: in the block. block: linear index in the grid, x fastest.
    """

    def __init__(self, thread: int = 0, block: int = 0) -> None:
        self.thread, self.block = thread, block
        self.entries: list[Entry] = []
        self._lane: int | None = None

    def begin_batch(self, batch: Batch) -> None:
        """Find the thread's lane, if its block is in the batch."""
        self._settle()
        self._batch = batch
        at = np.flatnonzero(batch.indices == self.block)
        self._lane = int(at[0]) * batch.threads + self.thread if at.size else None

    def instruction(self, instruction: Instruction, lanes: np.ndarray, issued: np.ndarray) -> None:
        """Add an entry for the instruction that the thread executes."""
        self._settle()
        if self._takes_part(lanes):
            self.entries.append(Entry(instruction, self._values(registers_of(instruction.operands))))

    def global_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Note the address in the thread's last entry."""
        self._note(instruction, lanes, addresses)

    def shared_access(
        self, instruction: Instruction, kind: str, lanes: np.ndarray, addresses: np.ndarray, size: int
    ) -> None:
        """Note the address in the thread's last entry."""
        # A copy has an address in both memories: that of its source is kept.
        if kind in ("load", "store"):
            self._note(instruction, lanes, addresses)

    def finish(self) -> None:
        """Read the results of the last entry."""
        self._settle()
        self._lane = None

    def _takes_part(self, lanes: np.ndarray) -> bool:
        if self._lane is None:
            return False
        at = int(np.searchsorted(lanes, self._lane))
        return at < lanes.size and int(lanes[at]) == self._lane

    def _note(self, instruction: Instruction, lanes: np.ndarray, addresses: np.ndarray) -> None:
        if self._takes_part(lanes) and self.entries and self.entries[-1].instruction.index == instruction.index:
            assert self._lane is not None
            self.entries[-1].address = int(addresses[np.searchsorted(lanes, self._lane)])

    def _settle(self) -> None:
        """The last instruction has taken effect: note what it wrote."""
        if self._lane is not None and self.entries and not self.entries[-1].results:
            self.entries[-1].results = self._values(results_of(self.entries[-1].instruction))

    def _values(self, names: list[str]) -> dict[str, int]:
        registers = self._batch.registers
        lane = self._lane
        assert lane is not None
        return {name: _bits(registers[name][lane : lane + 1]) for name in names if name in registers}


def results_of(instruction: Instruction) -> list[str]:
    """Names of the registers that an instruction writes."""
    if instruction.opcode in _NO_RESULT or not instruction.operands:
        return []
    return registers_of(instruction.operands[:1])


def registers_of(operands: tuple[Operand, ...]) -> list[str]:
    """Names of the registers in operands, each once."""
    return list(dict.fromkeys(name for operand in operands for name in _names(operand)))


def _names(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from _names(item)
    elif isinstance(operand, Pair):
        yield from _names(operand.first)
        yield from _names(operand.second)
    elif isinstance(operand, Not):
        yield operand.operand.name
    elif isinstance(operand, Address):
        yield from _names(operand.base)


def _is_read_too(instruction: Instruction, name: str) -> bool:
    return name in registers_of(instruction.operands[1:])


def _bits(value: np.ndarray) -> int:
    return int.from_bytes(value.tobytes(), "little")

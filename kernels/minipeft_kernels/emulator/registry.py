"""From an instruction to a function of the lanes that executes it.

Each family of opcodes registers builders. A builder looks at the instruction once, before anything runs, and returns
a closure over the arrays of its operands: nothing is looked up by name while the program runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .errors import AccessError, UnsupportedInstruction
from .lanes import ANY, DTYPES, Lanes
from .memory import Fault, Memory
from .observer import Observer
from .program import Instruction, Operand

Execute = Callable[[ANY], None]


@dataclass
class Context:
    """The run that builders build for: lanes, memory, observers of accesses to it, and state that families share."""

    lanes: Lanes
    memory: Memory
    global_watchers: list[Observer]
    shared_watchers: list[Observer]
    store_watchers: list[Observer]
    shared_state: dict[str, object] = field(default_factory=dict)
    resets: list[Callable[[], None]] = field(default_factory=list)


Builder = Callable[[Instruction, Context], Execute]
_BUILDERS: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for opcodes."""

    def register(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder
        return builder

    return register


def build(instruction: Instruction, context: Context) -> Execute:
    """The function that executes an instruction for given lanes.

    Raises:
        UnsupportedInstruction: the opcode, a modifier or a type is not known; it names the instruction whole.
    """
    builder = _BUILDERS.get(instruction.opcode)
    if builder is None:
        raise unsupported(instruction, f"opcode {instruction.opcode!r} is not known")
    try:
        return builder(instruction, context)
    except (KeyError, TypeError, IndexError) as error:
        raise unsupported(instruction, f"its operands or types are not known ({error})") from error


def unsupported(instruction: Instruction, why: str) -> UnsupportedInstruction:
    """The error for an instruction that the emulator lacks."""
    return UnsupportedInstruction(f"the emulator lacks {instruction.place}: {why}")


def only(instruction: Instruction, allowed: Iterable[str]) -> set[str]:
    """The modifiers as a set.

    Raises:
        UnsupportedInstruction: one is not among those allowed.
    """
    strange = [m for m in instruction.modifiers if m not in set(allowed)]
    if strange:
        raise unsupported(instruction, f"modifier .{strange[0]} is not known")
    return set(instruction.modifiers)


def pure(
    instruction: Instruction,
    context: Context,
    compute: Callable[..., np.ndarray],
    kinds: Iterable[str],
    result: str,
    operands: tuple[Operand, ...] | None = None,
) -> Execute:
    """An instruction whose result is a function of its sources.

    Args:
        compute: of the sources' values. kinds: type of each source. result: type of the first operand.
        operands: the sources, if they are not the operands after the first.
    """
    sources = instruction.operands[1:] if operands is None else operands
    kinds = tuple(kinds)
    if len(kinds) != len(sources):
        raise unsupported(instruction, f"expected {len(kinds)} source operands, found {len(sources)}")
    reads = [context.lanes.read(o, kind) for o, kind in zip(sources, kinds, strict=True)]
    write = context.lanes.write(instruction.operands[0], result)
    if len(reads) == 1:
        (a,) = reads
        return lambda lanes: write(lanes, compute(a(lanes)))
    if len(reads) == 2:
        a, b = reads
        return lambda lanes: write(lanes, compute(a(lanes), b(lanes)))
    if len(reads) == 3:
        a, b, c = reads
        return lambda lanes: write(lanes, compute(a(lanes), b(lanes), c(lanes)))
    return lambda lanes: write(lanes, compute(*(read(lanes) for read in reads)))


def refused(context: Context, instruction: Instruction, lanes: ANY, fault: Fault) -> AccessError:
    """The error for an access that memory refused: which thread, which instruction."""
    lane = int(context.lanes.indices(lanes)[fault.position])
    return AccessError(f"{fault.reason}; by {context.lanes.describe(lane)}, at {instruction.place}")


def signed(kind: str) -> bool:
    """True if an integer type is signed."""
    return DTYPES[kind].kind == "i"

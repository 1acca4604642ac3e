"""A program prepared to run: each instruction with its closure and what the machine has to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .lanes import ANY, WARP
from .program import Instruction, Program, Symbol
from .registry import Context, Execute, build, only, unsupported

PLAIN, BRANCH, EXIT, BARRIER, MEET = range(5)

# The place of the member mask among the operands, from the end or the start; None: no mask, all lanes.
_MASK = {"shfl": -1, "vote": -1, "match": -1, "redux": -1, "elect": -1, "ldmatrix": None, "stmatrix": None, "mma": None}
_BITS = (np.ones(WARP, np.uint64) << np.arange(WARP, dtype=np.uint64)).astype(np.uint32)
# Opcodes that may let another thread go on, and modifiers of loads by which a thread waits for another.
_STORING = ("st", "red")
_POLLING = ("volatile", "relaxed", "acquire")


@dataclass(slots=True)
class Step:
    """One instruction, ready.

    Attributes:
        kind: PLAIN; BRANCH to `target`; EXIT; BARRIER with `barrier` (its number) and `arriving` (how many threads, 0
            for the block); MEET, for which lanes of `width` must be together: those that `members` names, (n, width)
            bool for n lanes. aligned: all lanes must be there, in this very instruction.
        execute: does it. guard, negated: its predicate's array. stores: it may let a spinning
            thread go on. polls: a spinning thread may wait for what it reads.
    """

    instruction: Instruction
    kind: int
    execute: Execute
    guard: np.ndarray | None
    negated: bool
    target: int = -1
    barrier: Callable[[ANY], np.ndarray] | None = None
    arriving: Callable[[ANY], np.ndarray] | None = None
    waits: bool = True
    width: int = WARP
    members: Callable[[np.ndarray], np.ndarray] = lambda lanes: np.ones((lanes.size, WARP), bool)
    aligned: bool = False
    stores: bool = False
    polls: bool = False

    def guarded(self, lanes: ANY) -> ANY:
        """The lanes whose guard holds."""
        assert self.guard is not None
        if lanes is None:
            flags = ~self.guard if self.negated else self.guard
            return None if flags.all() else np.flatnonzero(flags)
        flags = self.guard[lanes]
        if self.negated:
            flags = ~flags
        return lanes if flags.all() else lanes[flags]


def prepare(program: Program, context: Context) -> list[Step]:
    """Every instruction's step, and behind them an exit for a program that falls off its end."""
    steps = [_step(i, program, context) for i in program.instructions]
    if not steps:
        raise ValueError(f"{program.name} has no instructions")
    end = Instruction(len(steps), "exit", (), (), (), None, None, None, False, "(end of the program)")
    return [*steps, Step(end, EXIT, _nothing, None, False)]


def _nothing(lanes: ANY) -> None:
    pass


def _step(instruction: Instruction, program: Program, context: Context) -> Step:
    guard, negated = None, False
    if instruction.predicate is not None:
        guard = context.lanes.registers[instruction.predicate.register]
        negated = instruction.predicate.negated
    name = instruction.opcode
    if name in ("ret", "exit"):
        return Step(instruction, EXIT, _nothing, guard, negated)
    if name == "trap":
        raise unsupported(instruction, "traps")
    if name == "bra":
        only(instruction, ("uni",))
        (label,) = instruction.operands
        if not isinstance(label, Symbol) or label.name not in program.labels:
            raise unsupported(instruction, "its label is not known")
        return Step(instruction, BRANCH, _nothing, guard, negated, target=program.labels[label.name])
    if name in ("bar", "barrier"):
        return _barrier(instruction, context, guard, negated)
    if name == "wgmma":
        execute = build(instruction, context)
        everyone = lambda lanes: np.ones((lanes.size, 128), bool)  # noqa: E731
        return Step(instruction, MEET, execute, guard, negated, width=128, members=everyone, aligned=True)
    execute = build(instruction, context)
    if name in _MASK:
        position = _MASK[name]
        members = _members(context, instruction, position) if position is not None else _all_lanes
        return Step(instruction, MEET, execute, guard, negated, members=members, aligned=position is None)
    polls = name == "atom" or (name == "ld" and any(m in _POLLING for m in instruction.modifiers))
    return Step(
        instruction,
        PLAIN,
        execute,
        guard,
        negated,
        stores=name in _STORING and instruction.space != "shared",
        polls=polls,
    )


def _all_lanes(lanes: np.ndarray) -> np.ndarray:
    return np.ones((lanes.size, WARP), bool)


def _members(context: Context, instruction: Instruction, position: int) -> Callable[[np.ndarray], np.ndarray]:
    read = context.lanes.read(instruction.operands[position], "b32")

    def members(lanes: np.ndarray) -> np.ndarray:
        return np.broadcast_to(read(lanes), lanes.shape)[:, None] & _BITS != 0

    return members


def _barrier(instruction: Instruction, context: Context, guard: np.ndarray | None, negated: bool) -> Step:
    """bar.sync, barrier.sync and their arrive; bar.warp.sync, which lets a warp's lanes meet."""
    mods = only(instruction, ("sync", "arrive", "warp", "cta", "aligned"))
    if "warp" in mods:
        return Step(
            instruction, MEET, _nothing, guard, negated, members=_members(context, instruction, 0), aligned=False
        )
    number, *count = (context.lanes.read(o, "u32") for o in instruction.operands)
    return Step(
        instruction,
        BARRIER,
        _nothing,
        guard,
        negated,
        barrier=number,
        arriving=count[0] if count else None,
        waits="arrive" not in mods,
        aligned=instruction.opcode == "bar" or "aligned" in mods,
    )

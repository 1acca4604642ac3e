"""cp.async: copies from global to shared memory that arrive late (PTX ISA 9.7.9.25).

The hardware may deliver at any time between the copy and the wait for it. Here the source is read at the copy and the
bytes arrive at the wait, not a moment earlier, so that a program that forgets to wait computes with old bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .lanes import ANY, WORDS, Lanes
from .memory import Fault
from .memory_ops import Shared, Space
from .program import Immediate, Instruction, Operand
from .registry import Context, Execute, only, opcode, refused, unsupported

_MODIFIERS = (
    *("async", "ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
    *("commit_group", "wait_group", "wait_all"),
)


@dataclass
class _Copy:
    """Copies of one instruction that have not arrived: by lane the group they belong to, the place and the bytes."""

    instruction: Instruction
    lanes: np.ndarray
    group: np.ndarray
    addresses: np.ndarray
    index: np.ndarray
    values: np.ndarray

    def part(self, chosen: np.ndarray) -> _Copy:
        """The copies of some of the lanes."""
        picked = (a[chosen] for a in (self.lanes, self.group, self.addresses, self.index, self.values))
        return _Copy(self.instruction, *picked)


class AsyncCopies:
    """The copies that are on their way in a batch. A thread's form groups, which it closes and waits for in order."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.closed = np.zeros(context.lanes.count, np.int64)
        self.pending: list[_Copy] = []
        context.resets.append(self.reset)

    def reset(self) -> None:
        """Nothing is on its way: a new batch starts."""
        self.closed[:] = 0
        self.pending = []

    def wait(self, lanes: ANY, newest: int | None) -> None:
        """Deliver the lanes' groups but for the `newest` closed ones; None: everything, closed or not."""
        kept = []
        member = None
        if lanes is not None:
            member = np.zeros(self.context.lanes.count, bool)
            member[lanes] = True
        for copy in self.pending:
            limit = self.closed[copy.lanes] - newest if newest is not None else copy.group + 1
            due = copy.group < limit
            if member is not None:
                due &= member[copy.lanes]
            if due.all():
                self._deliver(copy)
            elif due.any():
                self._deliver(copy.part(due))
                kept.append(copy.part(~due))
            else:
                kept.append(copy)
        self.pending = kept

    def _deliver(self, copy: _Copy) -> None:
        size = copy.values.dtype.itemsize
        for watcher in self.context.shared_watchers:
            watcher.shared_access(copy.instruction, "arrive", copy.lanes, copy.addresses, size)
        self.context.lanes.shared_words[size][copy.index] = copy.values


def copies_of(context: Context) -> AsyncCopies:
    """The one that all instructions of a program share."""
    found = context.shared_state.setdefault("async", None)
    if found is None:
        found = context.shared_state["async"] = AsyncCopies(context)
    assert isinstance(found, AsyncCopies)
    return found


@opcode("cp")
def build_cp(instruction: Instruction, context: Context) -> Execute:
    """cp.async, its groups and its waits. Bulk copies are not known."""
    mods = only(instruction, _MODIFIERS)
    copies = copies_of(context)
    if "commit_group" in mods:

        def commit(lanes: ANY) -> None:
            copies.closed[... if lanes is None else lanes] += 1

        return commit
    if "wait_all" in mods:
        return lambda lanes: copies.wait(lanes, None)
    if "wait_group" in mods:
        newest = context.lanes.constant(instruction.operands[0])
        return lambda lanes: copies.wait(lanes, newest)
    return _copy(instruction, context, copies)


def _copy(instruction: Instruction, context: Context, copies: AsyncCopies) -> Execute:
    lanes_of = context.lanes
    operands = list(instruction.operands)
    if "L2::cache_hint" in instruction.modifiers:
        operands.pop()
    target, source, size_operand, *rest = operands
    size = lanes_of.constant(size_operand)
    if size not in (4, 8, 16) or len(rest) > 1:
        raise unsupported(instruction, "its size must be 4, 8 or 16 bytes")
    target_address, source_address = lanes_of.address(target), lanes_of.address(source)
    wanted = _source_sizes(lanes_of, rest, size)
    shared = Shared(context)
    space = Space(_reading(instruction), context)

    def execute(lanes: ANY) -> None:
        addresses = target_address(lanes)
        try:
            index = shared.index(lanes, addresses, size)
        except Fault as fault:
            raise refused(context, instruction, lanes, fault) from None
        who = lanes_of.indices(lanes)
        for watcher in context.shared_watchers:
            watcher.shared_access(instruction, "async", who, addresses, size)
        values = _fetch(space, who, source_address(lanes), wanted(lanes), size)
        copies.pending.append(_Copy(instruction, who, copies.closed[who], addresses, index, values))

    return execute


def _reading(instruction: Instruction) -> Instruction:
    """The instruction as a load from global memory, which is its first half."""
    from dataclasses import replace

    return replace(instruction, modifiers=tuple(m for m in instruction.modifiers if not m.startswith("shared")))


def _source_sizes(lanes: Lanes, rest: list[Operand], size: int):  # type: ignore[no-untyped-def]
    """Bytes that each lane reads; the others it writes as zeros. A predicate means none."""
    if not rest:
        return lambda active: np.full(1, size, np.int64)
    if isinstance(rest[0], Immediate) or lanes.registers[rest[0].name].dtype != bool:  # type: ignore[union-attr]
        read = lanes.read(rest[0], "u32")
        return lambda active: read(active).astype(np.int64)
    ignored = lanes.read(rest[0], "pred")
    return lambda active: np.where(ignored(active), 0, size)


def _fetch(space: Space, lanes: np.ndarray, addresses: np.ndarray, wanted: np.ndarray, size: int) -> np.ndarray:
    wanted = np.broadcast_to(wanted, addresses.shape)
    if (wanted == size).all():
        return space.load(lanes, addresses, size, "async")
    raw = np.zeros((addresses.size, size), np.uint8)
    for amount in np.unique(wanted):
        some = np.flatnonzero(wanted == amount)
        if amount == size:
            words = space.load(lanes[some], addresses[some], size, "async")
            raw[some] = words.view(np.uint8).reshape(-1, size)
            continue
        for byte in range(int(amount)):
            raw[some, byte] = space.load(lanes[some], addresses[some] + byte, 1, "async")
    return raw.view(WORDS[size])[:, 0]

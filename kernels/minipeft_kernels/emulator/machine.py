"""Runs a program: grid into batches of blocks, a batch's lanes through the instructions together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Registers the opcodes.
from . import arithmetic, async_copy, atomics, bits, convert, memory_ops, tensor_cores, warp, wgmma  # noqa: F401
from .barriers import Barriers
from .errors import DeadlockError, EmulatorError
from .lanes import ANY, WARP, Lanes
from .meeting import split_by_warp, whole_warps
from .memory import Memory
from .observer import Launch, Observer
from .parameters import pack_arguments
from .program import Instruction, Program
from .registry import Context
from .schedule import Group, Schedule
from .steps import BARRIER, BRANCH, EXIT, MEET, PLAIN, Step, prepare

# Enough lanes that numpy's cost of a call is small beside its work, few enough that registers stay in the cache.
LANES = 8192
SPIN_LIMIT = 1_000_000


def run(
    program: Program,
    arguments: Sequence[int | float | bytes],
    memory: Memory,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int = 0,
    observers: Sequence[Observer] = (),
    *,
    blocks: Sequence[int] | None = None,
    seed: int | None = None,
    lanes: int = LANES,
    spin_limit: int = SPIN_LIMIT,
) -> None:
    """Execute every block of a grid.

    Args:
        arguments: one for each parameter: an int, a float, or the parameter's bytes; pointers are device addresses of
            `memory`. grid: blocks along x, y, z. threads: of a block, a multiple of 32.
        shared_bytes: of dynamic shared memory a block.
        observers: are told what happens; checks are observers.
        blocks: linear indices (x fastest) of those to run, None for the whole grid.
        seed: run a block's warps in an arbitrary order and interleaving instead of side by side.
        lanes: about how many threads run side by side; blocks beyond follow when those have ended. A block that waits
            for a later one needs both among them.
        spin_limit: jumps back without a store to global memory or an exit, after which threads count as spinning for
            ever; a turn that reads an atomic or a volatile value counts for 64.

    Raises:
        UnsupportedInstruction: before anything runs. AccessError, BarrierError, DeadlockError: see `errors`.
        ValueError: arguments, grid or threads do not fit the program.
    """
    if threads % WARP or threads <= 0:
        raise ValueError(f"threads must be a positive multiple of {WARP}, got {threads}")
    if program.threads is not None and threads != program.threads:
        raise ValueError(f"{program.name} is compiled for {program.threads} threads a block, got {threads}")
    if min(grid) < 1:
        raise ValueError(f"grid must be positive, got {grid}")
    launch = Launch(program, memory, grid, threads, shared_bytes)
    parameters = pack_arguments(program.parameters, arguments)
    order = np.arange(launch.blocks) if blocks is None else np.array(blocks, np.int64)
    if order.size and not (order.min() >= 0 and order.max() < launch.blocks):
        raise ValueError(f"blocks must be from 0 to {launch.blocks - 1}, got {order.min()} to {order.max()}")
    size = max(1, min(order.size, lanes // threads))
    with np.errstate(all="ignore"):
        machine: _Machine | None = None
        for first in range(0, order.size, size):
            some = order[first : first + size]
            if machine is None or machine.lanes.blocks != some.size:
                machine = _Machine(launch, some.size, parameters, observers, seed, spin_limit)
            if not first:
                for observer in observers:
                    observer.begin(launch)
            machine.run(some)
    for observer in observers:
        observer.finish()


def check_supported(program: Program) -> None:
    """Raise UnsupportedInstruction for the first instruction that the emulator lacks; run nothing."""
    launch = Launch(program, Memory(), (1, 1, 1), program.threads or WARP, 0)
    _Machine(launch, 1, bytes(program.parameter_bytes), (), None, SPIN_LIMIT)


class _Machine:
    """One batch's state, and the program prepared for it."""

    def __init__(
        self,
        launch: Launch,
        blocks: int,
        parameters: bytes,
        observers: Sequence[Observer],
        seed: int | None,
        spin_limit: int,
    ) -> None:
        self.launch, self.seed, self.spin_limit = launch, seed, spin_limit
        self.observers = observers
        self.lanes = Lanes(launch, blocks, parameters)
        self.context = Context(
            self.lanes,
            launch.memory,
            _overriding(observers, "global_access"),
            _overriding(observers, "shared_access"),
            _overriding(observers, "stored"),
        )
        self.watching = [o.instruction for o in _overriding(observers, "instruction")]
        self.steps = prepare(launch.program, self.context)
        self.idle = 0

    def run(self, indices: np.ndarray) -> None:
        """Blocks by their linear indices, to their end."""
        self.lanes.start(indices)
        for reset in self.context.resets:
            reset()
        for observer in self.observers:
            observer.begin_batch(self.lanes.batch)
        self.alive = np.ones(self.lanes.count, bool)
        self.schedule = Schedule(self.lanes.everyone, self.launch.threads, self.seed)
        self.barriers = Barriers(self.lanes, _overriding(self.observers, "barrier"))
        self.schedule.add(0, None)
        while (group := self.schedule.take()) is not None:
            self._advance(group)
        if self.barriers.waiting or self.schedule.stalled:
            raise DeadlockError("threads wait for ever: " + self._who_waits())

    def _advance(self, group: Group) -> None:
        """Run a group until it ends, waits, splits, or may meet another."""
        steps, watching, lanes = self.steps, self.watching, group.lanes
        limit, left = self.schedule.limit(group), self.schedule.span()
        pc = group.pc
        clock = self.lanes
        while True:
            step = steps[pc]
            active = lanes if step.guard is None else step.guarded(lanes)
            if step.kind == PLAIN:
                clock.clock += 1
                if watching:
                    self._watch(step.instruction, active, lanes)
                if active is None or active.size:
                    step.execute(active)
                    if step.stores:
                        self.idle = 0
                    elif step.polls:
                        group.polled = True
                pc += 1
            else:
                group.pc = pc
                if watching and step.kind != MEET:
                    self._watch(step.instruction, active, lanes)
                following = self._control(step, group, active)
                if following is None:
                    return
                pc = following
            left -= 1
            if pc >= limit or left <= 0:
                group.pc = pc
                self.schedule.push(group)
                return

    def _watch(self, instruction: Instruction, active: ANY, issued: ANY) -> None:
        lanes, all_lanes = self.lanes.indices(active), self.lanes.indices(issued)
        for hook in self.watching:
            hook(instruction, lanes, all_lanes)

    def _control(self, step: Step, group: Group, active: ANY) -> int | None:
        """An instruction that may split or stop a group. Where it goes on, None if it was put aside."""
        if step.kind == BRANCH:
            return self._branch(step, group, active)
        if step.kind == EXIT:
            return self._exit(group, active)
        if step.kind == BARRIER:
            return self._barrier(step, group, active)
        return self._meet(step, group, active)

    def _branch(self, step: Step, group: Group, active: ANY) -> int | None:
        lanes, here = group.lanes, group.pc
        taken = self.lanes.count if active is None else active.size
        if taken == 0:
            return here + 1
        whole = taken == (self.lanes.count if lanes is None else lanes.size)
        backward = step.target <= here
        if backward:
            self._spin(step.instruction, group.jumped())
        if whole and (not backward or self.schedule.alone):
            return step.target
        if whole:
            group.pc = step.target
            self.schedule.push(group)
            return None
        assert active is not None
        others = np.setdiff1d(self.lanes.indices(lanes), active, assume_unique=True)
        for pc, part in ((step.target, active), (here + 1, others)):
            self.schedule.push(Group(pc, part, group.slot, group.jumps, group.polled))
        return None

    def _spin(self, instruction: Instruction, weight: int) -> None:
        self.idle += weight
        if self.idle > self.spin_limit:
            raise DeadlockError(
                f"{self.spin_limit} jumps back without a store or an exit, the last at {instruction.place}: "
                "threads seem to wait for a value that nobody writes. Blocks beyond the first "
                f"{self.lanes.blocks} start only when those have ended: if one is waited for, raise `lanes`; if the "
                "loop is only long, raise `spin_limit`"
            )

    def _exit(self, group: Group, active: ANY) -> int | None:
        self.idle = 0
        self.alive[... if active is None else active] = False
        for pc, lanes in self.barriers.exited(self.alive, active):
            self.schedule.add(pc, lanes)
        # Lanes that wait for this one's warp may have all of it now.
        stalled, self.schedule.stalled = self.schedule.stalled, []
        for waiting in stalled:
            self.schedule.push(waiting)
        whole = active is None or active.size == self.lanes.indices(group.lanes).size
        if whole:
            return None
        if active is not None and active.size:
            group.lanes = np.setdiff1d(self.lanes.indices(group.lanes), active, assume_unique=True)
            group.pc += 1
            self.schedule.push(group)
            return None
        return group.pc + 1

    def _barrier(self, step: Step, group: Group, active: ANY) -> int | None:
        if active is not None and active.size == 0:
            return group.pc + 1
        released = self.barriers.arrive(step, group.pc, active, self.alive)
        if released is None and group.lanes is None and self.seed is None:
            return group.pc + 1
        rest = None
        if active is not None and active.size != self.lanes.indices(group.lanes).size:
            rest = np.setdiff1d(self.lanes.indices(group.lanes), active, assume_unique=True)
        if rest is not None:
            self.schedule.push(Group(group.pc + 1, rest, group.slot, group.jumps, group.polled))
        for pc, lanes in [(group.pc + 1, active)] if released is None else released:
            self.schedule.add(pc, lanes, group)
        return None

    def _meet(self, step: Step, group: Group, active: ANY) -> int | None:
        """An instruction of whole warps: those that are there execute it, the others wait for their rest."""
        if active is None or active.size == 0 or whole_warps(active, step.width):
            self._execute(step, active, group.lanes)
            return group.pc + 1
        joined = self.schedule.gather(group.pc, active)
        ready, early = split_by_warp(step, joined, self.alive, self.lanes)
        # Lanes whose guard is false do not wait.
        passing = np.setdiff1d(self.lanes.indices(group.lanes), active, assume_unique=True)
        going = np.sort(np.concatenate((passing, ready)))
        self._execute(step, ready, going)
        if ready.size == active.size == joined.size:
            return group.pc + 1
        if early.size:
            self.schedule.stall(Group(group.pc, early, group.slot))
        if going.size:
            self.schedule.add(group.pc + 1, going, group)
        return None

    def _execute(self, step: Step, active: ANY, issued: ANY) -> None:
        if self.watching:
            self._watch(step.instruction, active, issued)
        if active is None or active.size:
            step.execute(active)

    def _who_waits(self) -> str:
        """For the deadlock's message: where each warp is."""
        places: list[tuple[int, Instruction, str]] = []
        for lanes, pc in self.barriers.where():
            places += [(int(lane), self.steps[pc].instruction, "a barrier") for lane in lanes]
        for group in self.schedule.stalled:
            assert group.lanes is not None
            places += [(int(lane), self.steps[group.pc].instruction, "lanes of its warp") for lane in group.lanes]
        seen: dict[tuple[int, int], str] = {}
        for lane, instruction, what in sorted(places, key=lambda p: p[0]):
            seen.setdefault(
                (lane // WARP, instruction.index),
                f"{self.lanes.describe(lane)} for {what} at {instruction.place}",
            )
        lines = list(seen.values())
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        return "; ".join(lines[:8]) + more


def _overriding(observers: Sequence[Observer], hook: str) -> list[Observer]:
    """The observers that have a hook of their own."""
    return [o for o in observers if getattr(type(o), hook) is not getattr(Observer, hook)]


__all__ = ["EmulatorError", "check_supported", "pack_arguments", "run"]

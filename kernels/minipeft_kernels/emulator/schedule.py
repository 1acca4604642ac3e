"""The choice of the lanes that run next: groups of lanes at one instruction, splitting at branches and meeting again.

The group with the least instruction runs first, so groups that left a branch meet where its ways join. That rule alone
would let a group spin for ever on a lock that another holds: one that has jumped back often lets the others pass.
With a seed the warps of a block are groups of their own, which run in an arbitrary order for arbitrary spans.
"""

from __future__ import annotations

import random

import numpy as np

from .lanes import ANY, WARP

# Jumps back that a group may take while others wait: loops with fewer turns keep their lanes together. A turn in which
# it looked at what others may write (an atomic, an acquiring or volatile load) counts for many: it may be a spin.
PATIENCE = 256
_SPIN = 64
_LONGEST_SPAN = 64


class Group:
    """Lanes that are at one instruction. `lanes` None: all. `slot` keeps apart what a seed tells apart."""

    __slots__ = ("jumps", "lanes", "pc", "polled", "slot")

    def __init__(self, pc: int, lanes: ANY, slot: int = 0, jumps: int = 0, polled: bool = False) -> None:
        self.pc, self.lanes, self.slot, self.jumps, self.polled = pc, lanes, slot, jumps, polled

    def jumped(self) -> int:
        """It took a jump back; how many that counts for."""
        weight = _SPIN if self.polled else 1
        self.jumps += weight
        self.polled = False
        return weight


class Schedule:
    """The groups that can run and those that wait for lanes of their own warp (`stalled`)."""

    def __init__(self, everyone: np.ndarray, threads: int, seed: int | None) -> None:
        self.everyone, self.threads = everyone, threads
        self.random = random.Random(seed) if seed is not None else None
        self.ready: list[Group] = []
        self.stalled: list[Group] = []

    def add(self, pc: int, lanes: ANY, since: Group | None = None) -> None:
        """Lanes that can run from an instruction on; apart by warp if there is a seed. since: their group before."""
        jumps, polled = (since.jumps, since.polled) if since is not None else (0, False)
        if self.random is None:
            whole = lanes is None or lanes.size == self.everyone.size
            self.push(Group(pc, None if whole else lanes, 0, jumps, polled))
            return
        who = self.everyone if lanes is None else lanes
        blocks = who // self.threads
        coin = np.array([self.random.getrandbits(1) for _ in range(int(blocks.max()) + 1)])
        slots = who % self.threads // WARP * 2 + coin[blocks]
        for slot in np.unique(slots).tolist():
            self.push(Group(pc, who[slots == slot], slot, jumps, polled))

    def push(self, group: Group) -> None:
        """A group that can run; it joins one that is at the same place."""
        for other in self.ready:
            if other.pc == group.pc and other.slot == group.slot:
                self.ready.remove(other)
                group = self._joined(group, other)
                break
        self.ready.append(group)

    def stall(self, group: Group) -> None:
        """A group that waits for the rest of its warps."""
        self.stalled.append(group)

    def gather(self, pc: int, lanes: np.ndarray) -> np.ndarray:
        """Lanes at an instruction together with those that wait there, which wait no longer."""
        waiting = [g for g in self.stalled if g.pc == pc]
        if not waiting:
            return lanes
        self.stalled = [g for g in self.stalled if g.pc != pc]
        return np.sort(np.concatenate([lanes, *(g.lanes for g in waiting if g.lanes is not None)]))

    def take(self) -> Group | None:
        """The group to run, taken out; None if there is none."""
        if not self.ready:
            return None
        if self.random is not None:
            chosen = self.random.choice(self.ready)
        else:
            patient = [g for g in self.ready if g.jumps < PATIENCE]
            if not patient:
                for group in self.ready:
                    group.jumps = 0
                patient = self.ready
            chosen = min(patient, key=lambda g: g.pc)
        self.ready.remove(chosen)
        return chosen

    def limit(self, group: Group) -> int:
        """The first instruction at which a running group may meet another one."""
        behind = [g.pc for g in self.ready if g.pc > group.pc and g.slot == group.slot]
        return min(behind, default=1 << 60)

    def span(self) -> int:
        """The number of instructions that a group may run before another is chosen."""
        return self.random.randint(1, _LONGEST_SPAN) if self.random is not None else 1 << 60

    @property
    def alone(self) -> bool:
        """True if no other group exists than the one that runs."""
        return not self.ready and not self.stalled

    def _joined(self, a: Group, b: Group) -> Group:
        assert a.lanes is not None and b.lanes is not None, "lanes are in two groups"
        lanes: ANY = np.sort(np.concatenate((a.lanes, b.lanes)))
        if lanes is not None and lanes.size == self.everyone.size:
            lanes = None
        return Group(a.pc, lanes, a.slot, max(a.jumps, b.jumps), a.polled or b.polled)

"""`with emulate("sm_80") as run:` runs Triton kernels on CPU tensors, as the code that a GPU would run.

Inside the context `kernel[grid](tensor, ...)` compiles the kernel for the target and executes the PTX, with checks that
a GPU does not make. It is slow, some hundred thousand times slower than a GPU: for small shapes, proofs and counts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import AddressSpace, pack
from .checks import AsyncCopies, Races, Uninitialized
from .counts import Counter, Counts
from .driver import EmulatedDriver, Request, active_driver, check_triton
from .lanes import WARP
from .machine import run
from .memory import Memory
from .observer import Observer
from .parse import parse
from .program import Program
from .targets import capability_of
from .unwritten import Unwritten

_active: list[Emulation] = []

ChooseBlocks = Callable[[tuple[int, int, int]], "list[int] | None"]


@dataclass(frozen=True)
class EmulatedLaunch:
    """One launch that was run to its end.

    Attributes:
        name: of the kernel. program: its code. ptx: as text.
        grid: blocks. warps: of a block. shared: bytes of dynamic shared memory a block.
        constants: that the kernel was compiled with, by name.
        counts: what it did, or None if nothing was counted.
    """

    name: str
    program: Program
    ptx: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    constants: dict[str, Any]
    counts: Counts | None


@dataclass
class Emulation:
    """The value of `with emulate(...) as`: the launches so far, in order.

    Attributes:
        target: such as "sm_80". checks, counts, blocks, watch: as `emulate` was told.
    """

    target: str
    checks: bool
    counts: bool
    blocks: ChooseBlocks | None
    watch: Sequence[Observer] = ()
    launches: list[EmulatedLaunch] = field(default_factory=list)
    unwritten: Unwritten = field(default_factory=Unwritten, repr=False)
    _reachable: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def capability(self) -> int:
        """80 for "sm_80"."""
        return capability_of(self.target)

    @contextlib.contextmanager
    def reaching(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """A context whose kernels may reach `tensors`, by name, through addresses that they find in memory.

        Arguments need not be announced.
        """
        before = self._reachable
        self._reachable = {**before, **tensors}
        try:
            yield
        finally:
            self._reachable = before

    def launch(self, request: Request) -> None:
        """Run one launch. Raises: EmulatorError and its kinds, naming instruction, thread and tensor."""
        if 0 in request.grid:
            return
        program = _program(request.ptx)
        # The calls of torch in here are the emulator's, not the user's: `unwritten` must not take them for writes.
        with torch._C.DisableTorchFunction():
            arguments, memory = self._bind(program, request)
        counter = Counter() if self.counts else None
        # Triton has several threads hold one value, and store it: two stores of the same bytes are no race.
        checks: list[Observer] = [Uninitialized(), AsyncCopies(), Races(same_value=False)] if self.checks else []
        observers = [*checks, *([counter] if counter else []), *self.watch]
        blocks = self.blocks(request.grid) if self.blocks else None
        run(program, arguments, memory, request.grid, request.warps * WARP, request.shared, observers, blocks=blocks)
        counts = counter.counts if counter else None
        shape = (request.grid, request.warps, request.shared, request.constants)
        self.launches.append(EmulatedLaunch(request.name, program, request.ptx, *shape, counts))

    def _bind(self, program: Program, request: Request) -> tuple[list[bytes], Memory]:
        space = AddressSpace(self._reachable)
        arguments = [_parameter(space, *argument) for argument in request.arguments]
        arguments += self._scratch(space, program, request, len(arguments))
        memory = Memory()
        for region in space.regions:
            written = self.unwritten.written(region.key, region.array.size) if region.key else None
            initialized = region.initialized if written is None else written
            memory.bind(region.name, region.array, region.address, initialized)
        return arguments, memory

    @staticmethod
    def _scratch(space: AddressSpace, program: Program, request: Request, given: int) -> list[bytes]:
        """Pointers to the scratch memory that Triton adds behind the kernel's own parameters."""
        size = request.scratch * int(np.prod(request.grid))
        room = space.scratch("global scratch", size).address if size else 0
        missing = len(program.parameters) - given
        assert 0 <= missing <= 2, (program.parameters, request.arguments)
        return [address.to_bytes(8, "little") for address in (room, 0)[:missing]]


@contextlib.contextmanager
def emulate(
    target: str = "sm_80",
    *,
    checks: bool = True,
    counts: bool = True,
    blocks: ChooseBlocks | None = None,
    watch: Sequence[Observer] = (),
) -> Iterator[Emulation]:
    """A context in which Triton kernels run on CPU tensors, by the PTX that Triton compiles for `target`.

    Args:
        target: the GPU's architecture, "sm_80" or "sm_90".
        checks: look for reads of memory that was never written, races, and asynchronous copies that nobody waits for.
            Accesses out of bounds, misaligned ones and wrong barriers are found in any case.
        counts: count what is executed; `run.launches[i].counts`.
        blocks: given a grid, the blocks to run by their linear index (x fastest), or None for all: to count a part of
            a large grid. What the others would write is then not written.
        watch: further observers of every launch.

    Yields:
        The `Emulation`. Contexts may be nested, with other targets; at the end of each, Triton's driver is the one
        that it was. A kernel is compiled once a target and process.

    Raises:
        RuntimeError: Triton's version is not supported, or TRITON_INTERPRET is set. ValueError: an unknown target.
        EmulatorError (inside): a kernel does what a GPU would not do, or do undefined things with.
    """
    capability = capability_of(target)
    check_triton()
    emulation = Emulation(target, checks, counts, blocks, watch)
    with active_driver(EmulatedDriver(capability, emulation.launch)), emulation.unwritten:
        _active.append(emulation)
        try:
            yield emulation
        finally:
            _active.pop()


def current_emulation() -> Emulation | None:
    """The innermost `emulate` that is active, or None."""
    return _active[-1] if _active else None


@functools.lru_cache(maxsize=512)
def _program(ptx: str) -> Program:
    return parse(ptx)


def _parameter(space: AddressSpace, name: str, kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return space.pointer(name, value).to_bytes(8, "little")
    if kind.startswith(("tensordesc", "nvTmaDesc")):
        raise NotImplementedError(
            f"argument {name} is a tensor descriptor made on the host, which is not emulated: pass the tensor, and "
            "make the descriptor in the kernel"
        )
    return pack(name, kind, value)


@contextlib.contextmanager
def launching(target: str, reached: Mapping[str, Tensor]) -> Iterator[None]:
    """A context for one launch of an operation: in the active emulation, or in one of its own for `target`.

    Args:
        reached: tensors that the kernel finds by addresses in memory, by name.
    """
    active = current_emulation()
    with contextlib.ExitStack() as stack:
        emulation = active or stack.enter_context(emulate(target, counts=False))
        stack.enter_context(emulation.reaching(reached))
        yield

"""An emulator of PTX, the code that a Triton kernel compiles to, on the CPU: what it computes, checked and counted.

`parse` reads the text, `Memory` holds tensors at device addresses, `run` executes a grid of blocks. Observers watch:
the checks find accesses out of bounds, of unwritten bytes, races, missing waits and bad barriers.
"""

from .checks import AsyncCopies, Races, Uninitialized, all_checks
from .counts import Counts
from .emulate import EmulatedLaunch, Emulation, current_emulation, emulate, launching
from .errors import (
    AccessError,
    AsyncCopyError,
    BarrierError,
    DeadlockError,
    EmulatorError,
    PtxSyntaxError,
    RaceError,
    UninitializedError,
    UnsupportedInstruction,
)
from .machine import check_supported, run
from .memory import Memory
from .observer import Batch, Launch, Observer
from .parse import parse
from .program import Instruction, Program

__all__ = [
    "AccessError",
    "AsyncCopies",
    "AsyncCopyError",
    "BarrierError",
    "Batch",
    "Counts",
    "DeadlockError",
    "EmulatedLaunch",
    "Emulation",
    "EmulatorError",
    "Instruction",
    "Launch",
    "Memory",
    "Observer",
    "Program",
    "PtxSyntaxError",
    "RaceError",
    "Races",
    "Uninitialized",
    "UninitializedError",
    "UnsupportedInstruction",
    "all_checks",
    "check_supported",
    "current_emulation",
    "emulate",
    "launching",
    "parse",
    "run",
]

"""The emulator's errors. Every message names the instruction and, where there is one, its line of Python."""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """The program does something that a GPU would not do, or do undefined things with."""


class UnsupportedInstruction(EmulatorError):
    """The emulator lacks an instruction or a modifier; raised before anything runs."""


class PtxSyntaxError(EmulatorError):
    """The text is not PTX that the parser understands."""


class AccessError(EmulatorError):
    """A load or store outside every tensor, or misaligned."""


class UninitializedError(EmulatorError):
    """A load of bytes that nothing has written."""


class RaceError(EmulatorError):
    """Two warps touch the same bytes, one of them writes, and nothing orders them."""


class AsyncCopyError(EmulatorError):
    """Bytes that an asynchronous copy is still to write are read or written."""


class BarrierError(EmulatorError):
    """A barrier that not all of its threads reach as they must."""


class DeadlockError(EmulatorError):
    """Threads wait for each other, or spin on something that nobody will write."""

"""Lets minipeft's operations run in the emulator: whoever imports this module has them there within `emulate`.

`dispatch` imports it for MINIPEFT_BACKEND=ptx, `minipeft.kernels.emulator` for its public names.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from .. import dispatch
from ..emulator import current_emulation, launching
from ..emulator.targets import capability_of
from .bounds import gpus_of


class Emulator:
    """The emulator as `dispatch` asks for it (see `dispatch.Emulator`)."""

    def active_target(self) -> str | None:
        """The target of the innermost `emulate` that is active, such as "sm_80", or None."""
        active = current_emulation()
        return active.target if active else None

    def launching(self, target: str, reached: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context for one launch, in the active emulation or in one of its own for `target`."""
        return launching(target, reached)

    def multiprocessors(self, target: str) -> int:
        """As many as the first GPU of the target has, so that programs share tiles as they would there."""
        first, *_ = gpus_of(capability_of(target))
        return first.multiprocessors


dispatch.register_emulator(Emulator())

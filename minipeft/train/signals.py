"""Stopping a run from outside: the first SIGINT or SIGTERM asks, a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the next one acts as if never caught.

    A signal that the process inherited as ignored stays ignored: a shell script starts its background commands with
    SIGINT ignored, since Ctrl-C is meant for the foreground. Outside the main thread Python allows no handlers; there
    `requested` stays False.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return self.received is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            return
        # Nothing is cleaned up on the way out, as after kill -9: what is on disk is always whole.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

"""The start of the `minipeft` command, also of `python -m minipeft`.

Ctrl-C while modules are imported would end in a traceback out of some other package. So it is caught
first, with as few imports as that takes.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

# Turns for which OpenMP's threads wait busily, some hundredths of a microsecond each: longer than from one layer's
# product to the next. libgomp, which reads it when torch is imported, would take 300,000: beside other processes the
# thread that waits then keeps the one that it waits for from running.
SPINS = "5000"


def main() -> int:
    """Run the command line and return its exit code."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from minipeft.commands.cli import main as run

    signal.signal(signal.SIGINT, previous)
    return run()


def _end(number: int, frame: FrameType | None) -> None:
    # The process has begun nothing yet that would have to be tidied up.
    os.write(2, b"minipeft: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())

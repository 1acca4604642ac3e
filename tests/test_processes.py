"""Processes of the tests end: at their limit, with all that they started, and whatever pytest itself ignores."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import run_process

FORKS = """
import os, sys, time
child = os.fork()
if child:
    with open(sys.argv[1], "w") as file:
        print(os.getpid(), child, file=file)
time.sleep(600)
"""


def test_the_limit_ends_a_process_and_what_it_forked(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    for limit in (1, 10, 60):
        with pytest.raises(AssertionError, match=f"still running after {limit} seconds"):
            run_process([sys.executable, "-c", FORKS, str(pids)], limit=limit)
        if pids.exists():
            break
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def gone(pid: int) -> bool:
    """True once a process has ended; what has no parent any more is waited for by the system, in its own time."""
    for _ in range(2000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.parametrize("ignoring", [[], [signal.SIGINT]])
def test_interrupts_are_heard_unless_asked_otherwise(ignoring: list[signal.Signals]) -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    assert run_process([sys.executable, "-c", code], ignoring=ignoring).stdout == f"{bool(ignoring)}\n"

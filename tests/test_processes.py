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
print(os.fork() or os.getpid(), flush=True)
time.sleep(600)
"""


def test_the_limit_ends_a_process_and_what_it_forked() -> None:
    with pytest.raises(AssertionError, match="still running after 1 seconds") as raised:
        run_process([sys.executable, "-c", FORKS], limit=1)
    for pid in str(raised.value).split()[-2:]:
        for _ in range(1000):
            if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
                break
            time.sleep(0.01)
        else:
            os.kill(int(pid), signal.SIGKILL)
            pytest.fail("a forked process goes on")


@pytest.mark.parametrize("ignoring", [[], [signal.SIGINT]])
def test_interrupts_are_heard_unless_asked_otherwise(ignoring: list[signal.Signals]) -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    assert run_process([sys.executable, "-c", code], ignoring=ignoring).stdout == f"{bool(ignoring)}\n"

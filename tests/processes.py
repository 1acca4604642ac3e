"""Processes that tests start: none of them, nor of what they started, outlives its limit or its test."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from subprocess import PIPE

# Seconds. Many times what any of them takes, and less than pytest waits for a test (pyproject.toml), so that a process
# that hangs is ended here and the test fails with what it had printed.
LIMIT = 240


def run_process(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    check: bool = False,
    limit: float = LIMIT,
    ignoring: Sequence[signal.Signals] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with its output captured as text.

    Args:
        env: its whole environment; None for ours. text: its standard input. check: raise if its exit code is not 0.
        limit: seconds after which it is killed, with all processes that it started.
        ignoring: signals that it inherits as ignored.

    Raises:
        AssertionError: it ran into the limit, or `check` and it failed; with what it printed.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ignoring}
    try:
        # A session of its own: a group of processes to be killed at once.
        process = subprocess.Popen(
            command, env=env, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
        )
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    with process:
        try:
            out, err = process.communicate(text, timeout=limit)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            out, err = process.communicate()
            raise AssertionError(
                f"still running after {limit} seconds: {command}\n{out[-20000:]}\n{err[-5000:]}"
            ) from None
    assert not check or process.returncode == 0, f"exit code {process.returncode}\n{out[-20000:]}\n{err[-5000:]}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)

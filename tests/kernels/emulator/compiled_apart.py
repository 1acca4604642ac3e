"""Tests that compile kernels run in a process of their own: this one has Triton's interpreter on (see ../conftest.py).

A file in `compiled/` is an ordinary file of tests; `run_apart` runs it, without the interpreter, and fails with its
report if one of them does.
"""

import os
import sys
from pathlib import Path

from processes import run_process

COMPILED = Path(__file__).parent / "compiled"


def run_apart(file: str, *options: str) -> None:
    """Run `compiled/<file>` in a new process; every test in it must pass, and there must be one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MINIPEFT_", "PYTEST_"))}
    environment["TRITON_INTERPRET"] = "0"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", str(COMPILED / file)]
    run_process([*command, *options], env=environment, check=True)

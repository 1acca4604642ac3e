"""The tests of the compiled kernels on a GPU, in several processes, with whatever versions are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from benchmarks.environment import ROOT
from benchmarks.first_contact.record import Contact

TESTS = ROOT / "tests" / "kernels" / "test_on_gpu.py"


def run(contact: Contact) -> None:
    """One row: how many passed, and the names of those that failed."""
    # Warnings of versions that the project does not know must not fail a test.
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=",
        "-q",
        "-rf",
        "-p",
        "no:cacheprovider",
    ]
    words += [*([] if contact.pretend else ["-n", "14", "--dist", "worksteal"]), str(TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment.pop("MINIPEFT_BACKEND", None)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    (contact.folder / "suite.txt").write_text(done.stdout[-400_000:] + done.stderr[-20_000:])
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-2000:])}
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    contact.row(what="tests/kernels/test_on_gpu.py", code=done.returncode, failures=failed[:40], **counts)

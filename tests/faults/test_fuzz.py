"""The short form of the standing attack: files that were once read wrong, and some hundred new ones."""

import re
import sys
from pathlib import Path

import pytest
from faults.kept import READ, REFUSED
from processes import run_process

ROOT = Path(__file__).parents[2]


def test_changed_files_are_read_or_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(ROOT)
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults", "fuzz", "--inputs", "400", "--seed", "1000000"]
    done = run_process(command)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    total = re.search(r"^ *([\d,]+) inputs, .* 0 broke the promise", done.stdout, re.MULTILINE)
    assert total is not None and int(total[1].replace(",", "")) == 400 + len(REFUSED) + len(READ)

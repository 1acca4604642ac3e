"""PEFT's own tests, run on minipeft: one of ten, in about a minute. `python tests/peft_suite/run.py` runs them all."""

import re
import subprocess
from pathlib import Path

import pytest
from peft_suite import run as suite

PAGE = Path(__file__).parent.parent / "docs" / "differences.md"


def test_one_of_ten_passes_or_fails_as_the_list_says() -> None:
    try:
        outcomes = suite.run([f"test_{name}.py" for name in suite.FILES], every=10)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"PEFT's sources cannot be had: {error}")
    passed = sum(outcome["outcome"] == "passed" for outcome in outcomes.values())
    assert passed > 300
    assert suite.unexpected(outcomes) == []


def test_every_reason_of_the_list_stands_in_the_page() -> None:
    known = suite.differences()
    counts = {reason: list(known.values()).count(reason) for reason in known.values()}
    rows = re.findall(r"^\| ([^|]+?) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert {reason: int(number) for reason, number in rows} == counts

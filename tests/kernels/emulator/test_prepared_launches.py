"""Launches that were made before, without asking Triton again: see `compiled/test_prepared.py`."""

from compiled_apart import run_apart


def test_launches_that_were_made_before() -> None:
    run_apart("test_prepared.py")

"""`emulate` itself, in a process that compiles."""

from compiled_apart import run_apart


def test_emulate_runs_what_it_says_and_puts_everything_back() -> None:
    run_apart("test_emulate.py")

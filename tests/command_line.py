"""The `minipeft` command, run in this process."""

import contextlib
import io
from typing import Any

from minipeft.commands.cli import main


def run(*argv: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(part) for part in argv])
    return code, out.getvalue(), err.getvalue()


def ok(*argv: Any) -> str:
    """Standard output of a command that must succeed."""
    code, out, err = run(*argv)
    assert code == 0, err
    return out


def refused(*argv: Any) -> str:
    """The sentence of a command that must be refused: one line, no traceback, exit code 2."""
    code, _, err = run(*argv)
    assert code == 2
    assert err.startswith("minipeft: error: ") and err.count("\n") == 1, err
    return err.removeprefix("minipeft: error: ").strip()

"""The errors of training, each a class of its own.

All derive from `TrainingError`, so a caller such as the command line can print the sentence and stop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from minipeft.stored import LONGEST_ERROR, brief


class TrainingError(Exception):
    """Base of everything raised on purpose by `minipeft.train`. Its text is cut where it would fill a screen."""

    def __init__(self, message: str = "") -> None:
        super().__init__(brief(message, 2 * LONGEST_ERROR))


class ConfigError(TrainingError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another."""


class DataError(TrainingError, ValueError):
    """A record or a data file cannot be used.

    Attributes:
        path: the file, or None for records that were given in memory.
        line: 1-based line of the record, or None when the whole file is meant.
    """

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None) -> None:
        self.path = None if path is None else str(path)
        self.line = line
        place = self.path or ("record" if line is not None else "")
        if line is not None:
            place = f"{place}:{line}" if self.path else f"record {line}"
        super().__init__(f"{place}: {message}" if place else message)


class CheckpointError(TrainingError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class OutputDirError(TrainingError, ValueError):
    """The output directory already holds a run, or cannot be one."""


class ModelLoadError(TrainingError, ValueError):
    """A base model or tokenizer cannot be loaded from the given path."""


class MissingExtraError(TrainingError, ImportError):
    """An optional package that was asked for is not installed."""


class NonFiniteError(TrainingError, ArithmeticError):
    """The loss or the gradient stopped being a finite number.

    Attributes:
        step: the optimizer step (1-based) that was not taken.
    """

    def __init__(self, message: str, step: int) -> None:
        self.step = step
        super().__init__(message)


class OtherProcessError(TrainingError):
    """The first of several processes could not go on, and has said why; the others end in silence."""


class TrainingInterrupted(TrainingError):
    """SIGINT or SIGTERM arrived; the run was saved and can be resumed.

    Attributes:
        checkpoint: directory of the checkpoint that was saved.
        step: optimizer steps done.
        exit_code: what the process should exit with (130, as shells report SIGINT).
    """

    exit_code = 130

    def __init__(self, message: str, checkpoint: Path, step: int) -> None:
        self.checkpoint = checkpoint
        self.step = step
        super().__init__(message)


@contextlib.contextmanager
def as_user_error(kind: type[TrainingError], what: str | None = None) -> Iterator[None]:
    """Turn the ValueError, TypeError or OSError by which our API refuses an argument into `kind`.

    Only calls that check what the user gave stand inside; elsewhere such an error is a bug and keeps its traceback.
    """
    try:
        yield
    except TrainingError:
        raise
    except (ValueError, TypeError, OSError) as error:
        message = " ".join(str(error).split())
        raise kind(f"{what}: {message}" if what and what not in message else message) from error

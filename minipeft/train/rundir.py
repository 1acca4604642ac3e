"""The output directory of a run, and the rules that keep one run from overwriting another.

<output_dir>/
  run.json            settings and identity of the run
  log.jsonl           one row per log step and evaluation
  checkpoint-<step>/  see checkpoint.py
  adapter/            the trained adapter, once the run is complete
  loss_curve.png      with `plot: true`
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minipeft.files import write_text
from minipeft.train.checkpoint import checkpoint_step, list_checkpoints, read_checkpoint
from minipeft.train.config import TrainConfig
from minipeft.train.directories import remove_directory, remove_leftovers
from minipeft.train.errors import CheckpointError, OutputDirError
from minipeft.train.identity import check_identity

_TRACES = ("run.json", "log.jsonl", "adapter")


def check_output_dir(output_dir: str | Path, resume: bool | str | Path = False) -> None:
    """Refuse early what `Trainer.train` would refuse later; writes nothing.

    Raises:
        OutputDirError: the directory holds a run and `resume` is False, or it is not a directory.
        CheckpointError: there is nothing to resume from.
    """
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise OutputDirError(f"output_dir {directory} exists and is not a directory")
    if resume:
        find_resume(directory, resume)
    elif holds_run(directory):
        message = f"output_dir {directory} already holds a run"
        raise OutputDirError(f"{message}: resume it (--resume), or choose another directory")


@contextlib.contextmanager
def hold_run(directory: Path) -> Iterator[None]:
    """Keep other processes from training in `directory`; the lock ends with the block or with the process.

    Raises:
        OutputDirError: another process is training there.
    """
    # The directory itself is locked, so that no lock file can be left behind.
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        message = f"another process is training in {directory}: wait for it, or choose another directory"
        raise OutputDirError(message) from None
    except OSError:
        # Some network file systems have no locks; there the run goes on without one.
        pass
    try:
        yield
    finally:
        os.close(handle)


def check_not_running(directory: Path) -> None:
    """Raise OutputDirError if another process is training in `directory`."""
    if directory.is_dir():
        with hold_run(directory):
            pass


def holds_run(directory: Path) -> bool:
    """Whether a run has left something in the directory."""
    return any((directory / name).exists() for name in _TRACES) or bool(list_checkpoints(directory))


def find_resume(directory: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint to resume from: the one named, or the newest in `directory`.

    Returns:
        None for a run that was stopped before its first checkpoint, which starts over.

    Raises:
        CheckpointError: no run to resume.
    """
    if not isinstance(resume, bool):
        return _named_checkpoint(directory, Path(resume))
    checkpoints = list_checkpoints(directory)
    if checkpoints:
        return checkpoints[-1]
    if (directory / "run.json").exists():
        return None
    raise CheckpointError(f"nothing to resume in {directory}: it holds no checkpoint-<step> directory")


def _named_checkpoint(directory: Path, checkpoint: Path) -> Path:
    read_checkpoint(checkpoint)
    if holds_run(directory) and checkpoint.resolve().parent != directory.resolve():
        message = f"output_dir {directory} already holds a run, and {checkpoint} is not one of its checkpoints"
        raise OutputDirError(f"{message}: choose another output_dir")
    return checkpoint


def open_run(
    directory: Path, resume: bool | str | Path, config: TrainConfig, identity: Mapping[str, Any]
) -> Path | None:
    """Start a run in `directory` or reopen the one there.

    Returns:
        The checkpoint to load, or None to start from the beginning.

    Raises:
        OutputDirError, CheckpointError: see `check_output_dir`; also when the run there is a different one.
    """
    check_output_dir(directory, resume)
    checkpoint = find_resume(directory, resume) if resume else None
    if checkpoint is not None:
        check_identity(read_checkpoint(checkpoint)["identity"], identity, str(checkpoint))
    elif resume:
        check_identity(_read_run(directory)["identity"], identity, str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    if checkpoint is not None:
        _remove_later(directory, checkpoint)
    run = {"config": config.to_dict(), "identity": dict(identity)}
    write_text(directory / "run.json", json.dumps(run, indent=2, sort_keys=True) + "\n")
    return checkpoint


def _remove_later(directory: Path, checkpoint: Path) -> None:
    """Take back what was saved after the checkpoint that the run goes on from, as the log is taken back."""
    for path in list_checkpoints(directory):
        if checkpoint_step(path) > checkpoint_step(checkpoint):
            remove_directory(path)


def _read_run(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{directory / 'run.json'} is damaged: not valid JSON") from None

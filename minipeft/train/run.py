"""A run as it lies on disk, what makes two runs the same run, and how a run is stopped from outside.

<output_dir>/
  run.json            settings and identity of the run
  log.jsonl           one row per log step and evaluation
  checkpoint-<step>/  see checkpoint.py
  adapter/            the trained adapter, once the run is complete
  loss_curve.png      with `plot: true`; report.html with `page: true`; trackers.json with `report_to`

The rules here keep one run from overwriting another. A resumed run must continue the very run that was interrupted: its
identity is everything that decides its numbers, that is data, base model, adapter and settings. Paths are not part of
it: data and model are known by content, so a directory may be moved. Its length may grow: such a run is prolonged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from minipeft.files import file_sha256, remove_directory, remove_leftovers, write_text
from minipeft.shards import whole
from minipeft.stored import read_object
from minipeft.train.checkpoint import check_whole, checkpoint_step, list_checkpoints, read_checkpoint, tensor_bytes
from minipeft.train.config import TrainConfig
from minipeft.train.encoding import EncodedDataset
from minipeft.train.errors import CheckpointError, ConfigError, OutputDirError

logger = logging.getLogger(__name__)

_TRACES = ("run.json", "log.jsonl", "adapter")

# Settings that decide the numbers. Those of logging, saving, evaluating and gradient checkpointing do not.
_SETTINGS = (
    "packing",
    "batch_size",
    "gradient_accumulation",
    "epochs",
    "max_steps",
    "optimizer",
    "lr",
    "loraplus_lr_ratio",
    "scheduler",
    "scheduler_args",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "max_grad_norm",
    "precision",
    "seed",
)
_ACCUMULATION = "setting 'gradient_accumulation'"
# Of these, those that say how long a run is.
_LENGTH = ("setting 'epochs'", "setting 'max_steps'")
# Adapter settings that do not decide the numbers: places of files, versions, the way of the last use. The tokenizer is
# known by the data.
_INCIDENTAL = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "tokenizer_name_or_path")


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
    """True if a run has left something in the directory."""
    return any((directory / name).exists() for name in _TRACES) or bool(list_checkpoints(directory))


def find_resume(directory: Path, resume: bool | str | Path) -> Path | None:
    """The checkpoint to resume from: the path that `resume` is, or else the newest in `directory` that is whole.

    Returns:
        None for a run that was stopped before its first checkpoint, which starts over.

    Raises:
        CheckpointError: no run to resume, or none of its checkpoints, or not the one named, is as it was written.
    """
    if not isinstance(resume, bool):
        return _named_checkpoint(directory, Path(resume))
    checkpoints = list_checkpoints(directory)
    found, problems = newest_whole(checkpoints)
    if found is not None:
        return found
    if checkpoints:
        raise CheckpointError(f"nothing to resume in {directory}: {'; '.join(problems)}; remove them to start over")
    if (directory / "run.json").exists():
        return None
    raise CheckpointError(f"nothing to resume in {directory}: it holds no checkpoint-<step> directory")


def newest_whole(checkpoints: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The newest of `checkpoints`, oldest first, that is as it was written; and sentences on the newer ones."""
    problems: list[str] = []
    for path in reversed(checkpoints):
        try:
            check_whole(path)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def _named_checkpoint(directory: Path, checkpoint: Path) -> Path:
    check_whole(checkpoint)
    read_checkpoint(checkpoint)
    if holds_run(directory) and checkpoint.resolve().parent != directory.resolve():
        message = f"output_dir {directory} already holds a run, and {checkpoint} is not one of its checkpoints"
        raise OutputDirError(f"{message}: choose another output_dir")
    return checkpoint


def open_run(
    directory: Path,
    resume: bool | str | Path,
    config: TrainConfig,
    identity: Mapping[str, Any],
    steps_of: Callable[[TrainConfig], int],
) -> tuple[Path | None, int | None]:
    """Start a run in `directory` or reopen the one there.

    Args:
        steps_of: gives the optimizer steps of a run over this data with such settings.

    Returns:
        The checkpoint to load, or None to start from the beginning; and the steps that the run had when the checkpoint
        was written, if it is now to have more, else None.

    Raises:
        OutputDirError, CheckpointError: see `check_output_dir`; also when the run there is a different one, or longer.
    """
    check_output_dir(directory, resume)
    checkpoint = find_resume(directory, resume) if resume else None
    shorter = None
    for problem in newest_whole(list_checkpoints(directory))[1] if resume is True else ():
        logger.warning("%s: going on from %s instead", problem, checkpoint)
    if checkpoint is not None:
        shorter = _length_before(read_checkpoint(checkpoint)["identity"], identity, str(checkpoint), config, steps_of)
    elif resume:
        _length_before(_read_run(directory)["identity"], identity, str(directory), config, steps_of)
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    if checkpoint is not None:
        _remove_later(directory, checkpoint)
    run = {"config": config.to_dict(), "identity": dict(identity)}
    write_text(directory / "run.json", json.dumps(run, indent=2, sort_keys=True) + "\n")
    return checkpoint, shorter


def _length_before(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    source: str,
    config: TrainConfig,
    steps_of: Callable[[TrainConfig], int],
) -> int | None:
    """The steps of the run `saved` if it differs from that of `now` in being shorter; None if it has as many steps.

    Raises CheckpointError where it is longer, or differs in something else.
    """
    check_identity({**saved, **{name: now[name] for name in _LENGTH}}, now, source)
    length: dict[str, Any] = {name.split("'")[1]: saved.get(name) for name in _LENGTH}
    try:
        stored = dataclasses.replace(config, **length)
    except ConfigError as error:
        raise CheckpointError(f"{source} is damaged: in the identity of its run, {error}") from None
    before, after = steps_of(stored), steps_of(config)
    if after < before:
        message = f"cannot resume from {source}: the run had {before} steps and would now have {after}"
        raise CheckpointError(
            f"{message}; --resume with more epochs or max_steps prolongs a run, none makes it shorter"
        )
    return before if after > before else None


def _remove_later(directory: Path, checkpoint: Path) -> None:
    """Take back what was saved after the checkpoint that the run goes on from, as the log is taken back."""
    for path in list_checkpoints(directory):
        if checkpoint_step(path) > checkpoint_step(checkpoint):
            remove_directory(path)


def _read_run(directory: Path) -> dict[str, Any]:
    file = directory / "run.json"
    run = read_object(file, lambda message: CheckpointError(f"{file} is damaged: {message}"))
    if not isinstance(run.get("identity"), dict):
        raise CheckpointError(f"{file} is damaged: it holds no identity of a run")
    return run


def run_identity(model: Any, data: EncodedDataset, config: TrainConfig, processes: int = 1) -> dict[str, Any]:
    """The identity of a run as a flat JSON-serializable mapping.

    Micro-batches are counted over all processes: how many share them does not matter.
    """
    identity: dict[str, Any] = {f"setting {name!r}": getattr(config, name) for name in _SETTINGS}
    identity[_ACCUMULATION] *= processes
    if config.packing:
        identity["setting 'max_length'"] = data.max_length
    identity["training data (sha256)"] = data.content_hash()
    identity["base model (fingerprint)"] = model_fingerprint(model)
    if config.adapter is not None:
        identity["adapter to go on with (sha256)"] = file_sha256(Path(config.adapter) / "adapter_model.safetensors")
    for name, peft_config in getattr(model, "peft_config", {}).items():
        settings = peft_config.to_dict()
        for key in sorted(settings.keys() - set(_INCIDENTAL)):
            identity[f"adapter {name!r} {key!r}"] = settings[key]
    # Through JSON, so that it equals the identity read back from a file: tuples become lists, sets are sorted.
    return json.loads(json.dumps(identity, default=_plain))


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError that names every field in which two identities differ."""
    # What one of them does not have is a setting of another version, which is null where it asks for nothing.
    different = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    if not different:
        return
    if _ACCUMULATION in different:
        # It counts the micro-batches of all processes.
        source = f"{source} (gradient_accumulation times the number of processes must stay as it was)"
    details = "; ".join(f"{key} was {_short(saved.get(key))}, is now {_short(now.get(key))}" for key in different)
    raise CheckpointError(f"cannot resume from {source}, it belongs to a different run: {details}")


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """sha256 over names, shapes, dtypes and up to 1024 evenly spaced elements of everything frozen.

    That is parameters that need no gradient, and buffers, in which 4-bit weights keep their scales.

    Samples are enough to tell models apart, and cost milliseconds where hashing every byte would cost
    seconds. Of a sharded model all processes must ask: a tensor at a time is gathered.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.requires_grad:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = whole(tensor.detach()).reshape(-1)
        digest.update(tensor_bytes(flat[:: max(1, flat.numel() // 1024)]))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value that JSON has no type for: sets as sorted lists, the rest by its text."""
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class StopSignal:
    """Stops a run: while entered, the first SIGINT or SIGTERM sets `requested`, the next one ends the process at once.

    A signal that the process inherited as ignored stays ignored: a shell script starts its background commands with
    SIGINT ignored, since Ctrl-C is meant for the foreground. Outside the main thread Python allows no handlers; there
    `requested` stays False.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return self.received is not None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = signal.Signals(number), time.monotonic()
            return
        if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._at < 1:
            return  # Ctrl-C reaches a process of torchrun's twice: from the terminal, and from torchrun
        # Nothing is cleaned up on the way out, as after kill -9: what is on disk is always whole.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

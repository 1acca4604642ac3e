"""Trackers of experiments that are told of a run beside its log: TensorBoard, Weights & Biases, trackio, MLflow.

The rows are those of `log.jsonl`. Project and server are taken from each library's own environment variables
(WANDB_PROJECT, WANDB_MODE, TRACKIO_DIR, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...); the project is else
"minipeft", and the run has the name of its folder. A resumed run goes on under the id that `trackers.json` keeps. A
tracker that fails while training is given up with a warning: the log has everything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minipeft.files import write_text
from minipeft.stored import read_object
from minipeft.train.config import TRACKER_CHOICES
from minipeft.train.errors import ConfigError, MissingExtraError

logger = logging.getLogger(__name__)

PROJECT = "minipeft"


class Tracker(Protocol):
    """One place that a run is reported to.

    Attributes:
        id: what the library calls the run; None where it needs no name to go on.
    """

    id: str | None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, at a step."""

    def close(self, failed: bool) -> None:
        """No more is to come; `failed` if the run was stopped or ended by an error."""


class TensorBoard:
    """Event files in `tensorboard/` beside the log."""

    def __init__(self, folder: Path, id: str | None, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; its files lie in `wandb/` beside the log."""

    def __init__(self, folder: Path, id: str | None, settings: Mapping[str, Any]) -> None:
        import wandb

        self.id = id or uuid.uuid4().hex[:12]
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        name = os.environ.get("WANDB_NAME", folder.resolve().name)
        self._run = wandb.init(
            project=project, name=name, id=self.id, resume="allow", dir=str(folder), config=dict(settings)
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, whose name has a part of its own, as another run's folder may have the same."""

    def __init__(self, folder: Path, id: str | None, settings: Mapping[str, Any]) -> None:
        import trackio

        self.id = id or f"{folder.resolve().name}-{uuid.uuid4().hex[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project=project, name=self.id, resume="allow", config=dict(settings), embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, by its client: the process's active run, if any, is another's."""

    def __init__(self, folder: Path, id: str | None, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        self.id = id
        if id is not None:
            self._client.update_run(id, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        known = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.id = self._client.create_run(known, run_name=folder.resolve().name).info.run_id
        # Longer values are refused.
        params = [Param(name, str(value)[:6000]) for name, value in settings.items()]
        self._client.log_batch(self.id, params=params)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


# Of each: its class, the module that must be there, and what installs it.
_KINDS: dict[str, tuple[Any, str, str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard", "tensorboard"),
    "wandb": (WeightsAndBiases, "wandb", "wandb"),
    "trackio": (Trackio, "trackio", "trackio"),
    "mlflow": (MLflow, "mlflow", "mlflow"),
}
assert tuple(_KINDS) == TRACKER_CHOICES


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError now rather than after the model is loaded."""
    import importlib

    for name in names:
        _, module, package = _KINDS[name]
        try:
            importlib.import_module(module)
        except ImportError:
            message = f"report_to {name} needs the package {package}: pip install {package}"
            raise MissingExtraError(message) from None


class Trackers:
    """All trackers of a run.

    Args:
        folder: the run's, which keeps the ids under which it goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Tracker] = {}

    def start(self, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Begin a run with each of the trackers `names`, or go on with it.

        Args:
            settings: what the run is, in plain values.

        Raises:
            ConfigError: a tracker that cannot be started.
        """
        file = self._folder / "trackers.json"
        ids = read_object(file, ConfigError) if names and file.is_file() else {}
        for name in names:
            known = ids.get(name)
            try:
                self._open[name] = _KINDS[name][0](self._folder, known if isinstance(known, str) else None, settings)
            except Exception as error:  # of many kinds: the network's, the server's, a login that is missing
                self.close()
                said = " ".join(str(error).split()) or type(error).__name__
                raise ConfigError(f"report_to {name}: it cannot be started: {said}") from error
        found = {name: tracker.id for name, tracker in self._open.items() if tracker.id is not None}
        if found:
            ids |= found
            write_text(file, json.dumps(ids, indent=2, sort_keys=True) + "\n")

    def log(self, row: Mapping[str, Any]) -> None:
        """Tell all of them of a row of the log."""
        values = {name: float(value) for name, value in row.items() if name != "step" and _is_number(value)}
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(values, row["step"])
            except Exception as error:  # what is far away may fail in any way, and the run is worth more
                del self._open[name]
                logger.warning("nothing more is reported to %s, the log has it: %s", name, error)

    def close(self) -> None:
        """Tell all of them that the run has ended; that it failed, while an error is on its way."""
        failed = sys.exc_info()[0] is not None
        for tracker in self._open.values():
            with contextlib.suppress(Exception):
                tracker.close(failed)
        self._open.clear()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

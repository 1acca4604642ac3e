"""Runs reported to trackers: what the libraries themselves have stored is the log, also of a run that was resumed."""

import json
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_runs import make_config, make_data, make_model

import minipeft.train.trackers
from minipeft.train import ConfigError, MissingExtraError, Trainer, TrainingInterrupted, read_log

# Of the packages' own making.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


def trainer(folder: Path, **settings: Any) -> Trainer:
    config = make_config(folder, log_every=1, max_steps=4, save_every=2, **settings)
    return Trainer(make_model(), make_data(), config, eval_data=make_data(), progress_bar=False)


def run_in_two_parts(folder: Path, monkeypatch: pytest.MonkeyPatch, report_to: str) -> list[dict[str, Any]]:
    """A run that is stopped after two steps and resumed; its log."""
    first = trainer(folder, report_to=report_to)
    monkeypatch.setattr(first, "_save", lambda save=first._save: (save(), setattr(first, "_stopping", True))[0])
    with pytest.raises(TrainingInterrupted):
        first.train()
    trainer(folder, report_to=report_to).train(resume=True)
    rows = read_log(folder / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    return rows


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run_in_two_parts(tmp_path / "run", monkeypatch, "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(dict(losses(rows)))
    assert [event.value for event in events.Scalars("eval_loss")] == pytest.approx([rows[-1]["eval_loss"]])


def unblocked(content: bytes) -> bytes:
    """A file of wandb's without the headers of its blocks, which stand in the midst of what does not fit one.

    A header of seven bytes, then blocks of 32 KiB with records of four bytes of checksum, two of length, one of kind.
    """
    at, parts = 7, []
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
    return b"".join(parts)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = run_in_two_parts(tmp_path / "run", monkeypatch, "wandb")
    # Offline, each part is a file of its own, under one id.
    id = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert files
    expected = [str(loss) for _, loss in losses(rows)] + [str(rows[-1]["eval_loss"])]
    for _ in range(100):  # wandb's own process writes, and is done a little after the run
        stored = b"".join(unblocked(file.read_bytes()) for file in files)
        if all(number.encode() in stored for number in expected):
            break
        time.sleep(0.1)
    assert [number for number in expected if number.encode() in stored] == expected


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    import trackio.utils

    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    rows = run_in_two_parts(tmp_path / "run", monkeypatch, "trackio")
    id = json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]
    (database,) = (tmp_path / "trackio").glob("minipeft*.db")
    connection = sqlite3.connect(database)
    stored = connection.execute("select step, metrics from metrics where run_name = ? order by id", (id,)).fetchall()
    connection.close()
    assert [(step, json.loads(values)["loss"]) for step, values in stored if b'"loss"' in values] == losses(rows)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows = run_in_two_parts(tmp_path / "run", monkeypatch, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    assert [(m.step, m.value) for m in client.get_metric_history(id, "loss")] == losses(rows)
    run = client.get_run(id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["max_steps"] == "4" and run.data.params["training_records"] == str(len(make_data()))
    with pytest.raises(ZeroDivisionError):
        broken = trainer(tmp_path / "other", report_to="mlflow")
        monkeypatch.setattr(broken, "_step", lambda group: 1 / 0)
        broken.train()
    id = json.loads((tmp_path / "other" / "trackers.json").read_text())["mlflow"]
    assert client.get_run(id).info.status == "FAILED"


class Recorder:
    """A tracker that fails at the second row."""

    id = "an-id"
    told: ClassVar[list[Any]] = []

    def __init__(self, folder: Path, id: str | None, settings: dict[str, Any]) -> None:
        self.told.append(("start", id, settings["max_steps"]))

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, sorted(values)))
        if step == 2:
            raise ConnectionError("the server is gone")

    def close(self, failed: bool) -> None:
        self.told.append(("close", failed))


def test_a_tracker_that_fails_costs_a_warning_and_one_that_cannot_start_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = minipeft.train.trackers._KINDS
    monkeypatch.setitem(kinds, "wandb", (Recorder, "json", "wandb"))
    Recorder.told = []
    plain = trainer(tmp_path / "plain").train()
    result = trainer(tmp_path / "run", report_to="wandb").train()
    assert result.loss == plain.loss and result.steps == 4
    assert "nothing more is reported to wandb, the log has it: the server is gone" in caplog.text
    assert Recorder.told[0] == ("start", None, 4)
    assert [told[0] for told in Recorder.told[1:]] == [1, 2]
    assert {"loss", "lr", "tokens"} <= set(Recorder.told[1][1])
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["step"] == 4

    def broken(*arguments: Any) -> None:
        raise PermissionError("no login\nat all")

    monkeypatch.setitem(kinds, "wandb", (broken, "json", "wandb"))
    with pytest.raises(ConfigError, match=r"^report_to wandb: it cannot be started: no login at all$"):
        trainer(tmp_path / "other", report_to="wandb").train()


def test_names_are_checked_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'report_to'.*tensorboard, wandb, trackio, mlflow.*'tensorbord'"):
        make_config(tmp_path / "run", report_to="wandb,tensorbord")
    assert make_config(tmp_path, report_to=" wandb, mlflow,wandb", tensorboard=True).trackers() == [
        *("wandb", "mlflow", "tensorboard")
    ]
    assert make_config(tmp_path, report_to="none").trackers() == []
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = trainer(tmp_path / "run", report_to="wandb")
    with pytest.raises(MissingExtraError, match="report_to wandb needs the package wandb: pip install wandb"):
        run.train()
    assert not (tmp_path / "run").exists()

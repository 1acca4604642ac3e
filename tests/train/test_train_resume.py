"""A run that is stopped, however it is stopped, goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train_loop import interrupt
from tiny_runs import make_config, make_data, make_model, trained_parameters

from minipeft.files import TEMPORARY_PREFIX
from minipeft.train import (
    CheckpointError,
    NonFiniteError,
    OutputDirError,
    Trainer,
    TrainingInterrupted,
    list_checkpoints,
    read_log,
)
from minipeft.train.checkpoint import read_checkpoint

# Batches of 2 over 13 documents: 7 micro-batches an epoch, so steps end mid-epoch and at its end, and one is smaller.
COUNT = 13


def trainer(output_dir, model=None, data=None, **settings):
    model = model or make_model(dropout=0.3, seed=1)
    config = make_config(output_dir, **({"log_every": 1, "save_every": 1} | settings))
    return Trainer(model, data or make_data(COUNT), config, progress_bar=False)


def numbers(output_dir):
    """What of a log must repeat: everything but time, speed and memory."""
    volatile = ("seconds", "tokens_per_second", "memory_mib")
    return [{k: v for k, v in row.items() if k not in volatile} for row in read_log(output_dir / "log.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Parameters and log of a whole run of 7 steps with dropout."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    run = trainer(output_dir)
    run.train()
    return trained_parameters(run.model), numbers(output_dir)


def assert_same_run(run, uninterrupted):
    parameters, log = uninterrupted
    for name, parameter in trained_parameters(run.model).items():
        assert torch.equal(parameter, parameters[name]), name
    assert numbers(run.output_dir) == log


def test_dropout_makes_a_difference_here(tmp_path, uninterrupted):
    """Otherwise the tests below would pass without the generators' states."""
    run = trainer(tmp_path / "run", seed=99)
    run.train()
    parameters, _ = uninterrupted
    assert any(not torch.equal(p, parameters[n]) for n, p in trained_parameters(run.model).items())


@pytest.mark.parametrize("at_forward", [1, 2, 5, 8, 9])
def test_interrupted_run_goes_on_bit_for_bit(tmp_path, uninterrupted, at_forward):
    model = make_model(dropout=0.3, seed=1)
    interrupt(model, at_forward)
    with pytest.raises(TrainingInterrupted):
        trainer(tmp_path / "run", model).train()
    torch.manual_seed(12345)  # a new process would not have the old one's generator
    run = trainer(tmp_path / "run")
    run.train(resume=True)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("settings", [{"packing": True}, {"gradient_checkpointing": True}, {"log_every": 3}])
def test_interrupted_run_goes_on_bit_for_bit_with(tmp_path, settings):
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    model = make_model(dropout=0.3, seed=1)
    interrupt(model, 6)
    with pytest.raises(TrainingInterrupted):
        trainer(tmp_path / "run", model, **settings).train()
    run = trainer(tmp_path / "run", **settings)
    run.train(resume=True)
    assert_same_run(run, (trained_parameters(whole.model), numbers(whole.output_dir)))


def test_resume_from_a_named_checkpoint(tmp_path, uninterrupted):
    trainer(tmp_path / "run").train()
    run = trainer(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-3" / "training_state.json").write_text("damaged")
    run.train(resume=tmp_path / "run" / "checkpoint-2")
    assert_same_run(run, uninterrupted)
    assert read_checkpoint(tmp_path / "run" / "checkpoint-3")["progress"]["step"] == 3, "later ones are written anew"


def test_checkpoint_of_another_directory_does_not_overwrite_a_run(tmp_path):
    trainer(tmp_path / "one").train()
    trainer(tmp_path / "two", max_steps=2).train()
    with pytest.raises(OutputDirError, match=r"two already holds a run, and .*checkpoint-2 is not one of its"):
        trainer(tmp_path / "two").train(resume=tmp_path / "one" / "checkpoint-2")


def test_resuming_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    trainer(tmp_path / "run").train()
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    run = trainer(tmp_path / "run")
    assert run.train(resume=True).steps == 7
    assert_same_run(run, uninterrupted)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_non_finite_run_resumes_from_its_last_checkpoint(tmp_path, uninterrupted):
    model = make_model(dropout=0.3, seed=1)
    forwards = []

    def poison(module, inputs, output):
        forwards.extend([1] * module.training)
        return output * float("nan") if len(forwards) == 6 else output

    model.model.norm.register_forward_hook(poison)
    with pytest.raises(NonFiniteError):
        trainer(tmp_path / "run", model).train()
    run = trainer(tmp_path / "run")
    run.train(resume=True)
    assert_same_run(run, uninterrupted)


class Killed(BaseException):
    """Stands for kill -9: nothing after it may run, so cleaning up is switched off as well."""


@pytest.mark.parametrize("operation", range(0, 60, 4))
def test_death_at_any_file_operation_leaves_a_run_that_resumes(tmp_path, monkeypatch, uninterrupted, operation):
    done = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal done
            done += 1
            if done > operation:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patched:
        for name in ("replace", "fsync"):
            patched.setattr(os, name, counted(getattr(os, name)))
        patched.setattr("shutil.rmtree", counted(__import__("shutil").rmtree))
        patched.setattr(Path, "unlink", counted(Path.unlink))
        patched.setattr("tempfile.mkdtemp", counted(__import__("tempfile").mkdtemp))
        with pytest.raises(Killed):
            trainer(tmp_path / "run", save_every=2, keep_last=1).train()
    survivors = list_checkpoints(tmp_path / "run")
    assert all(read_checkpoint(path)["progress"]["step"] in (2, 4, 6, 7) for path in survivors)
    run = trainer(tmp_path / "run", save_every=2, keep_last=1)
    # Killed before run.json was there, the directory holds no run, and starting is what works.
    run.train(resume=(tmp_path / "run" / "run.json").exists())
    assert_same_run(run, uninterrupted)
    assert not list((tmp_path / "run").glob(TEMPORARY_PREFIX + "*")) and not list((tmp_path / "run").glob(".*.tmp"))


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from test_train_resume import trainer
from pathlib import Path
run = trainer(Path({output!r}), max_steps=400)
# Long lines: a pipe holds 16 of them, so the process is never more than that ahead of who reads.
run.model.model.register_forward_hook(lambda *_: print("forward".ljust(4096), flush=True))
run.train()
"""


def test_killed_process_leaves_a_run_that_resumes(tmp_path):
    output = tmp_path / "run"
    script = SCRIPT.format(paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)], output=str(output))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(25):
            assert process.stdout.readline(), process.stderr.read()
        time.sleep(0.013)  # somewhere: in a forward pass, in a save
    finally:
        process.kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert 8 <= read_checkpoint(list_checkpoints(output)[-1])["progress"]["step"] < 400
    run = trainer(output, max_steps=400)
    interrupt(run.model, 7)
    with pytest.raises(TrainingInterrupted) as stopped:
        run.train(resume=True)
    reference = trainer(tmp_path / "reference", max_steps=400)

    def stop_there(optimizer, args, kwargs):
        if reference.progress.step + 1 == stopped.value.step:
            signal.raise_signal(signal.SIGINT)

    reference.optimizer.register_step_post_hook(stop_there)
    with pytest.raises(TrainingInterrupted):
        reference.train()
    assert_same_run(run, (trained_parameters(reference.model), numbers(reference.output_dir)))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"lr": 2e-2}, "setting 'lr' was 0.01, is now 0.02"),
        ({"batch_size": 3}, "setting 'batch_size' was 2, is now 3"),
        ({"seed": 5}, "setting 'seed' was 0, is now 5"),
        ({"scheduler": "linear"}, 'setting \'scheduler\' was "cosine", is now "linear"'),
        ({"loraplus_lr_ratio": 4.0}, "setting 'loraplus_lr_ratio' was null, is now 4.0"),
        ({"packing": True}, "setting 'packing' was false, is now true"),
        ({"data": make_data(COUNT, seed=1)}, r"training data \(sha256\) was"),
        ({"model": make_model(dropout=0.3, seed=2)}, r"base model \(fingerprint\) was"),
        ({"model": make_model(dropout=0.2, seed=1)}, "adapter 'default' 'lora_dropout' was 0.3, is now 0.2"),
    ],
)
def test_resuming_a_different_run_names_the_field(tmp_path, settings, field):
    model = make_model(dropout=0.3, seed=1)
    interrupt(model, 3)
    with pytest.raises(TrainingInterrupted):
        trainer(tmp_path / "run", model).train()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=f"different run: .*{field}"):
        trainer(tmp_path / "run", **settings).train(resume=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_what_does_not_change_the_run_may_differ(tmp_path, uninterrupted):
    model = make_model(dropout=0.3, seed=1)
    interrupt(model, 3)
    with pytest.raises(TrainingInterrupted):
        trainer(tmp_path / "run", model).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    run = trainer(tmp_path / "moved", save_every=3, keep_last=1)
    run.train(resume=True)
    assert_same_run(run, uninterrupted)


def stopped_run(tmp_path):
    model = make_model(dropout=0.3, seed=1)
    interrupt(model, 3)
    with pytest.raises(TrainingInterrupted) as stopped:
        trainer(tmp_path / "run", model).train()
    return stopped.value.checkpoint


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("training_state.safetensors", "missing"),
        ("training_state.safetensors", "cut"),
        ("adapter_model.safetensors", "missing"),
        ("adapter_model.safetensors", "cut"),
        ("adapter_model.safetensors", "changed"),
    ],
)
def test_damaged_checkpoint_is_an_error_that_names_it(tmp_path, name, damage):
    path = stopped_run(tmp_path) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-5])
    if damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"checkpoint-1.*(missing|damaged|bit for bit)"):
        trainer(tmp_path / "run").train(resume=True)


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing to resume in .*run"):
        trainer(tmp_path / "run").train(resume=True)
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        trainer(tmp_path / "run").train(resume=tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}'])
def test_unknown_checkpoint_format_is_an_error(tmp_path, content):
    path = stopped_run(tmp_path)
    (path / "training_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged|checkpoint format"):
        trainer(tmp_path / "run").train(resume=True)


def test_checkpoints_hold_no_pickle_and_only_the_adapter(tmp_path):
    path = stopped_run(tmp_path)
    suffixes = {p.suffix for p in path.iterdir()}
    assert suffixes <= {".safetensors", ".json", ".md"}
    (tmp_path / "plain").write_text("")
    assert {p.stat().st_mode for p in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    state = json.loads((path / "training_state.json").read_text())
    assert state["progress"]["step"] == 1
    model_bytes = sum(p.numel() * p.element_size() for p in make_model().parameters())
    assert sum(p.stat().st_size for p in path.iterdir()) < model_bytes


def test_log_rows_after_the_checkpoint_are_taken_back(tmp_path, uninterrupted):
    stopped_run(tmp_path)
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 2, "loss": 123.0}\n{"step": 3, "lo')
    run = trainer(tmp_path / "run")
    run.train(resume=True)
    assert_same_run(run, uninterrupted)

"""A checkpoint that is not as it was written is noticed, whatever was done to it, and never gone on from."""

import json
import logging
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train_resume import numbers, trainer
from tiny_runs import trained_parameters

from minipeft.commands.cli import main
from minipeft.train import CheckpointError, list_checkpoints
from minipeft.train.manifest import MANIFEST, damage, write_manifest

FILES = (
    "training_state.json",
    "training_state.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    MANIFEST,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps with a checkpoint each, its parameters and its log."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = trainer(folder, max_steps=4)
    run.train()
    return folder, trained_parameters(run.model), numbers(folder)


def change(path, kind):
    """Do something to a file that leaves it readable where it can."""
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[:-3])
    elif kind == "longer":
        path.write_bytes(content + b" ")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "edited":
        # A number becomes another: text that reads as well as before, or one bit of a tensor.
        edited = re.sub(rb"\d(?=\D*$)", lambda found: b"1" if found[0] != b"1" else b"2", content)
        path.write_bytes(edited if path.suffix == ".json" else content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("kind", ["missing", "cut", "longer", "empty", "edited"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, finished, caplog, file, kind):
    folder, parameters, log = finished
    shutil.copytree(folder, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoint-4"
    change(damaged / file, kind)
    run = trainer(tmp_path / "run", max_steps=4)
    with pytest.raises(CheckpointError, match=rf"checkpoint-4 is damaged: .*{file}"):
        run.train(resume=damaged)
    with caplog.at_level(logging.WARNING):
        run.train(resume=True)
    assert re.search(r"checkpoint-4 is damaged: .*going on from .*checkpoint-3 instead", caplog.text)
    assert all(torch.equal(p, parameters[name]) for name, p in trained_parameters(run.model).items())
    assert numbers(tmp_path / "run") == log
    # It was written anew.
    assert [damage(path) for path in list_checkpoints(tmp_path / "run")] == [[], [], [], []]


def test_several_damaged_ones_are_passed_over_and_none_left_is_an_error(tmp_path, finished, caplog):
    folder, parameters, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    for step in (2, 3, 4):
        change(tmp_path / "run" / f"checkpoint-{step}" / "training_state.safetensors", "edited")
    run = trainer(tmp_path / "run", max_steps=4)
    run.train(resume=True)
    assert caplog.text.count("checkpoint-1 instead") == 3
    assert all(torch.equal(p, parameters[name]) for name, p in trained_parameters(run.model).items())
    for path in list_checkpoints(tmp_path / "run"):
        change(path / "adapter_config.json", "edited")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(
        CheckpointError, match=r"nothing to resume in .*checkpoint-4 is .*checkpoint-1 is .* start over"
    ):
        trainer(tmp_path / "run", max_steps=4).train(resume=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_file_that_was_put_in_is_damage_where_it_could_be_read(tmp_path, finished):
    folder, _, _ = finished
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("mine")
    assert damage(tmp_path / "checkpoint-4") == []
    (tmp_path / "checkpoint-4" / "optimizer_state.safetensors").write_bytes(b"")
    assert damage(tmp_path / "checkpoint-4") == ["optimizer_state.safetensors does not belong to it"]


def test_the_paged_state_and_every_other_file_are_in_the_manifest(tmp_path):
    trainer(tmp_path / "run", max_steps=1, optimizer="paged_adamw").train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    names = {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    assert {"optimizer_state.safetensors", *FILES} - {MANIFEST} <= names
    for name in names:
        change(checkpoint / name, "edited" if (checkpoint / name).suffix == ".json" else "longer")
    assert {problem.split()[0] for problem in damage(checkpoint)} == names
    assert not (tmp_path / "run" / "adapter" / MANIFEST).exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.integers(0, 2**31), st.integers(0, 7))
def test_one_bit_anywhere_is_noticed(tmp_path, finished, file, place, bit):
    folder, _, _ = finished
    target = tmp_path / "checkpoint-4"
    if not target.exists():
        shutil.copytree(folder / "checkpoint-4", target)
    content = (target / file).read_bytes()
    place %= len(content)
    (target / file).write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
    own = file == MANIFEST
    assert damage(target) == [f"{file} {'itself is not as it was' if own else 'holds other bytes than were'} written"]
    (target / file).write_bytes(content)
    assert damage(target) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.binary(max_size=60), st.sampled_from([b"[]", b'{"files": 3}', b'{"files": {"a": 1}}', b"[" * 9999]))
)
def test_any_manifest_is_read_or_called_damage(tmp_path, finished, content):
    folder, _, _ = finished
    target = tmp_path / "checkpoint-4"
    if not target.exists():
        shutil.copytree(folder / "checkpoint-4", target)
    (target / MANIFEST).write_bytes(content)
    assert damage(target)


def test_inspect_verifies(tmp_path, finished, capsys):
    folder, _, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    assert main(["inspect", "--verify", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("as it was written") == 4
    change(tmp_path / "run" / "checkpoint-3" / "training_state.json", "edited")
    assert main(["inspect", "--verify", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.out.count("as it was written") == 3
    assert "checkpoint-3: damaged\n  training_state.json holds other bytes than were written" in said.out
    assert said.err == "minipeft: error: 1 of 4 checkpoints are damaged: checkpoint-3\n"
    assert main(["inspect", "--verify", str(tmp_path / "run" / "checkpoint-2")]) == 0
    assert main(["inspect", "--verify", str(tmp_path / "run" / "checkpoint-3")]) == 2
    for nothing in (tmp_path / "run" / "adapter", tmp_path / "nothing"):
        assert main(["inspect", "--verify", str(nothing)]) == 2
        assert "holds no checkpoint" in capsys.readouterr().err


def test_a_length_that_is_none_is_named_with_its_checkpoint(tmp_path, finished):
    """Its manifest was written anew: what is refused is what it says."""
    folder, _, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    file = checkpoint / "training_state.json"
    state = json.loads(file.read_text())
    (name,) = (name for name in state["identity"] if "'max_steps'" in name)
    file.write_text(json.dumps({**state, "identity": {**state["identity"], name: ["x"] * 99}}))
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged: .*'max_steps' must be a whole number"):
        trainer(tmp_path / "run", max_steps=4).train(resume=checkpoint)

"""A run that is resumed with more epochs or steps than it had goes on, with the rates that its new length has."""

import logging
import math

import pytest
import torch
from test_train_loop import interrupt
from test_train_resume import COUNT, numbers, trainer
from tiny_runs import make_model, trained_parameters

from minipeft.train import CheckpointError, TrainingInterrupted, list_checkpoints, read_log
from minipeft.train.checkpoint import read_checkpoint

LR, WARMUP = 1e-2, 2


def cosine(taken, total):
    """The rate of the next step after `taken` of `total` steps (Loshchilov and Hutter 2017), after a linear warm-up."""
    if taken < WARMUP:
        return LR * taken / WARMUP
    return LR * 0.5 * (1 + math.cos(math.pi * (taken - WARMUP) / (total - WARMUP)))


def rates(output_dir):
    return [row["lr"] for row in read_log(output_dir / "log.jsonl") if "lr" in row]


def as_if_never_stopped(output_dir, short, long, at, **settings):
    """A run of `long` steps, not resumed, whose rates are those of `short` steps in its first `at` steps."""
    shorter, run = (trainer(output_dir, max_steps=steps, **settings) for steps in (short, long))
    run.schedule.lr_lambdas = [
        lambda taken, one=one, other=other: one(taken) if taken < at else other(taken)
        for one, other in zip(shorter.schedule.lr_lambdas, run.schedule.lr_lambdas, strict=True)
    ]
    run.train()
    return run


def assert_same(run, expected):
    wanted = trained_parameters(expected.model)
    for name, parameter in trained_parameters(run.model).items():
        assert torch.equal(parameter, wanted[name]), name
    assert numbers(run.output_dir) == numbers(expected.output_dir)


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "paged_adamw_8bit"}, {"packing": True}, {"loraplus_lr_ratio": 4.0}, {"scheduler": "linear"}],
    ids=str,
)
def test_a_finished_run_goes_on_as_if_it_had_never_stopped(tmp_path, settings, caplog):
    trainer(tmp_path / "run", max_steps=7, **settings).train()
    run = trainer(tmp_path / "run", max_steps=16, **settings)
    torch.manual_seed(12345)
    with caplog.at_level(logging.WARNING):
        assert run.train(resume=True).steps == 16
    assert_same(run, as_if_never_stopped(tmp_path / "whole", 7, 16, at=7, **settings))
    name = settings.get("scheduler", "cosine")
    assert f"the run of 7 steps goes on to 16; from step 8 the learning rate is that of the {name}" in caplog.text


def test_the_rates_are_those_of_the_formula(tmp_path):
    trainer(tmp_path / "run", max_steps=7).train()
    trainer(tmp_path / "run", max_steps=16).train(resume=True)
    expected = [cosine(taken, 7) for taken in range(7)] + [cosine(taken, 16) for taken in range(7, 16)]
    assert rates(tmp_path / "run") == pytest.approx(expected, rel=1e-12)
    # A cosine that had come to its end rises again.
    assert rates(tmp_path / "run")[7] > 5 * rates(tmp_path / "run")[6]


def test_more_epochs(tmp_path):
    trainer(tmp_path / "run", epochs=2, max_steps=None).train()
    run = trainer(tmp_path / "run", epochs=3, max_steps=None)
    steps = math.ceil(math.ceil(COUNT / 2) / 2)  # 13 documents, 2 to a batch, 2 batches to a step
    assert run.train(resume=True).steps == 3 * steps
    assert_same(run, as_if_never_stopped(tmp_path / "whole", 2 * steps, 3 * steps, at=2 * steps))
    again = trainer(tmp_path / "run", epochs=2, max_steps=16)  # the length is given in another way
    assert again.train(resume=True).steps == 16


def test_a_run_that_was_stopped_may_be_prolonged_too(tmp_path):
    model = make_model(dropout=0.3, seed=1)
    interrupt(model, 8)
    with pytest.raises(TrainingInterrupted) as stopped:
        trainer(tmp_path / "run", model, max_steps=7).train()
    run = trainer(tmp_path / "run", max_steps=16)
    run.train(resume=True)
    assert_same(run, as_if_never_stopped(tmp_path / "whole", 7, 16, at=stopped.value.step))


@pytest.mark.parametrize("at_forward", [1, 5])
def test_a_prolonged_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, at_forward):
    trainer(tmp_path / "run", max_steps=7).train()
    model = make_model(dropout=0.3, seed=1)
    interrupt(model, at_forward)
    with pytest.raises(TrainingInterrupted):
        trainer(tmp_path / "run", model, max_steps=16).train(resume=True)
    run = trainer(tmp_path / "run", max_steps=16)
    run.train(resume=True)
    assert_same(run, as_if_never_stopped(tmp_path / "whole", 7, 16, at=7))


def test_from_a_named_checkpoint_into_another_folder(tmp_path):
    trainer(tmp_path / "run", max_steps=7).train()
    run = trainer(tmp_path / "other", max_steps=16)
    run.train(resume=tmp_path / "run" / "checkpoint-5")
    expected = as_if_never_stopped(tmp_path / "whole", 7, 16, at=5)
    wanted = trained_parameters(expected.model)
    assert all(torch.equal(p, wanted[name]) for name, p in trained_parameters(run.model).items())


def test_the_same_length_in_other_words_is_the_same_run(tmp_path, caplog):
    trainer(tmp_path / "run", epochs=2, max_steps=None).train()
    before = numbers(tmp_path / "run")
    assert trainer(tmp_path / "run", epochs=2, max_steps=8).train(resume=True).steps == 8
    assert numbers(tmp_path / "run") == before and "prolonged" not in caplog.text


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"max_steps": None, "epochs": 1}])
def test_a_run_is_not_made_shorter(tmp_path, settings):
    trainer(tmp_path / "run", max_steps=7).train()
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    steps = settings["max_steps"] or 4
    with pytest.raises(CheckpointError, match=f"had 7 steps and would now have {steps}; .* prolongs a run"):
        trainer(tmp_path / "run", **settings).train(resume=True)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files


def test_what_else_makes_it_another_run_is_named_alone(tmp_path):
    trainer(tmp_path / "run", max_steps=7).train()
    with pytest.raises(CheckpointError, match=r"different run: setting 'seed' was 0, is now 3$"):
        trainer(tmp_path / "run", max_steps=16, seed=3).train(resume=True)


def test_the_checkpoints_belong_to_the_longer_run(tmp_path):
    trainer(tmp_path / "run", max_steps=7, keep_last=1).train()
    trainer(tmp_path / "run", max_steps=9, keep_last=1).train(resume=True)
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.name == "checkpoint-9"
    assert read_checkpoint(checkpoint)["identity"]["setting 'max_steps'"] == 9
    with pytest.raises(CheckpointError, match="had 9 steps and would now have 7"):
        trainer(tmp_path / "run", max_steps=7).train(resume=True)

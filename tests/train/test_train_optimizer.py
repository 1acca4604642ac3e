"""The loop with the paged optimizers: the same training, and a run that is stopped goes on bit for bit."""

import pytest
import torch
from test_train_loop import interrupt
from tiny_runs import make_config, make_data, make_model, trained_parameters

from minipeft import PagedAdamW
from minipeft.train import CheckpointError, ConfigError, Trainer, TrainingInterrupted

MEMORY = {"page_bytes": 4096, "host_budget": 8192}
PAGED = ["paged_adamw", "paged_adamw_8bit"]


def trainer(output_dir, spill_dir=None, **settings):
    args = {"optimizer_args": MEMORY | {"spill_dir": str(spill_dir)}} if spill_dir else {}
    config = make_config(output_dir, **{**args, "log_every": 1, **settings})
    return Trainer(make_model(dropout=0.3, seed=1), make_data(13), config, progress_bar=False)


def test_paged_run_is_torchs_run(tmp_path):
    theirs, ours = trainer(tmp_path / "torch"), trainer(tmp_path / "paged", tmp_path, optimizer="paged_adamw")
    theirs.train()
    ours.train()
    assert isinstance(ours.optimizer, PagedAdamW) and ours.optimizer.memory_stats()["page_ins"] > 0
    for name, parameter in trained_parameters(ours.model).items():
        torch.testing.assert_close(parameter, trained_parameters(theirs.model)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", PAGED)
def test_interrupted_paged_run_goes_on_bit_for_bit(tmp_path, optimizer):
    whole = trainer(tmp_path / "whole", optimizer=optimizer)
    whole.train()
    run = trainer(tmp_path / "run", tmp_path, optimizer=optimizer)
    interrupt(run.model, 6)
    with pytest.raises(TrainingInterrupted) as stopped:
        run.train()
    assert (stopped.value.checkpoint / "optimizer_state.safetensors").exists()
    resumed = trainer(tmp_path / "run", tmp_path, optimizer=optimizer)
    resumed.train(resume=True)
    if optimizer == "paged_adamw":  # of 8 bits, all state of this model fits into the budget
        assert resumed.optimizer.memory_stats()["page_ins"] > 0, "paging goes on after loading"
    for name, parameter in trained_parameters(resumed.model).items():
        assert torch.equal(parameter, trained_parameters(whole.model)[name]), name


def stopped_run(tmp_path):
    run = trainer(tmp_path / "run", optimizer="paged_adamw")
    interrupt(run.model, 6)
    with pytest.raises(TrainingInterrupted) as stopped:
        run.train()
    return stopped.value.checkpoint


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_optimizer_state_is_an_error_that_names_it(tmp_path, damage):
    path = stopped_run(tmp_path) / "optimizer_state.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-5])
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3 is damaged: optimizer_state.safetensors (is missing|has .* were written)"
    ):
        trainer(tmp_path / "run", optimizer="paged_adamw").train(resume=True)


def test_another_optimizer_is_another_run(tmp_path):
    stopped_run(tmp_path)
    with pytest.raises(CheckpointError, match='setting \'optimizer\' was "paged_adamw", is now "adamw"'):
        trainer(tmp_path / "run").train(resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "'optimizer' must be one of adamw, paged_adamw, paged_adamw_8bit"),
        ({"optimizer_args": MEMORY}, "adamw takes no optimizer_args"),
        ({"optimizer": "paged_adamw", "optimizer_args": {"budget": 1}}, "unknown optimizer_args .*'budget'"),
        ({"optimizer": "paged_adamw", "optimizer_args": {"host_budget": 4096}}, "must hold 2 pages"),
        (
            {"optimizer": "paged_adamw", "optimizer_args": {"host_budget": "lots"}},
            "must be a number of bytes, got 'lots'",
        ),
        ({"optimizer": "paged_adamw", "optimizer_args": {"host_budget": True}}, "must be a number of bytes, got True"),
        ({"optimizer": "paged_adamw", "optimizer_args": {"host_budget": float("inf")}}, "a number of bytes, got inf"),
        ({"optimizer": "paged_adamw", "optimizer_args": MEMORY}, "give spill_dir"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path / "run", **settings)

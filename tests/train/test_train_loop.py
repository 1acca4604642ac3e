import json
import math
import signal
import sys
import types

import pytest
import torch
from tiny_runs import make_config, make_data, make_model, trained_parameters

from minipeft import PeftModel
from minipeft.train import (
    Example,
    MissingExtraError,
    NonFiniteError,
    OutputDirError,
    Trainer,
    TrainingInterrupted,
    check_output_dir,
    list_checkpoints,
    read_log,
)
from minipeft.train.batches import collate
from minipeft.train.loop import total_steps
from minipeft.train.run import StopSignal


def trainer(output_dir, data=None, model=None, eval_data=None, **settings):
    config = make_config(output_dir, **settings)
    return Trainer(model or make_model(), data or make_data(), config, eval_data=eval_data, progress_bar=False)


@pytest.mark.parametrize("packing", [False, True])
def test_accumulated_step_equals_the_big_batch(tmp_path, packing):
    """Micro-batches with 1 to 10 learned tokens each: a mean of means would be far off."""
    trained = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        run = trainer(
            tmp_path / str(batch_size),
            make_data(8, high=20, max_length=20),
            make_model(dtype=torch.float64),
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            packing=packing,
            max_steps=1,
            max_grad_norm=None,
            # SGD-like: with Adam's own epsilon the first step is only the gradient's sign.
            eps=1e3,
            warmup_steps=0,
            weight_decay=0.0,
            lr=1e6,
        )
        before = trained_parameters(run.model)
        run.train()
        trained.append({n: p - before[n] for n, p in trained_parameters(run.model).items()})
    assert max(p.abs().max() for p in trained[0].values()) > 1e-3
    for other in trained[1:]:
        for name, change in trained[0].items():
            torch.testing.assert_close(other[name], change, rtol=1e-6, atol=1e-9)


def test_training_lowers_the_loss_and_leaves_the_base_bit_identical(tmp_path):
    model = make_model()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    data = make_data(6)
    run = trainer(tmp_path / "run", data, model, data, max_steps=30, lr=3e-2, eval_at_start=True, save_every=None)
    result = run.train()
    assert result.eval_end.loss < 0.7 * result.eval_start.loss
    assert result.steps == 30 and result.tokens > 0 and result.peak_memory > 0
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


def test_saved_adapter_gives_the_trained_model_back(tmp_path):
    run = trainer(tmp_path / "run")
    result = run.train()
    fresh = PeftModel.from_pretrained(make_model(adapter=False), str(result.adapter_dir))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(fresh.eval()(ids).logits, run.model.eval()(ids).logits, rtol=0, atol=0)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    runs = [trainer(tmp_path / str(on), gradient_checkpointing=on, max_steps=2) for on in (False, True)]
    for run in runs:
        run.train()
    assert not runs[1].model.is_gradient_checkpointing, "it is switched off again"
    plain, checkpointed = (trained_parameters(run.model) for run in runs)
    for name, parameter in plain.items():
        torch.testing.assert_close(checkpointed[name], parameter, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_keeps_adapter_and_loss_in_float32(tmp_path):
    run = trainer(tmp_path / "run", precision="bf16", max_steps=2)
    result = run.train()
    assert math.isfinite(result.loss)
    assert {p.dtype for p in trained_parameters(run.model).values()} == {torch.float32}


def test_clipping_bounds_the_gradient(tmp_path):
    run = trainer(tmp_path / "run", max_grad_norm=1e-3, max_steps=1)
    norms = []

    def measure(optimizer, args, kwargs):
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in run.parameters)))

    run.optimizer.register_step_pre_hook(measure)
    run.train()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    row = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert row["grad_norm"] > 1e-2, "the log has the norm before clipping"


def test_weight_decay_is_on_matrices_only(tmp_path):
    model = make_model()
    next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).requires_grad_(True)
    groups = trainer(tmp_path, model=model).optimizer.param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.1, {2}), (0.0, {1})]


def test_every_epoch_has_every_text_once(tmp_path):
    data, seen = make_data(13), []
    config = make_config(tmp_path / "run", max_steps=12)  # of four steps an epoch
    run = Trainer(make_model(), data, config, progress_bar=False)
    embeddings = run.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: seen.extend(args[0].tolist()))
    run.train()
    seen = [row for row in seen if row != [1, 2, 3]]  # by which the trainer tries the model
    texts = [[*example.input_ids, *[0] * 32] for example in data.examples]
    assert len(seen) == 3 * len(texts)
    for epoch in range(3):
        rows = seen[epoch * len(texts) : (epoch + 1) * len(texts)]
        matches = [[i for i, text in enumerate(texts) if text[: len(row)] == row] for row in rows]
        assert sorted(i for (i,) in matches) == list(range(len(texts)))


def test_padding_is_not_attended_to():
    batch = collate([Example([5, 6, 7], [-100, 6, 7]), Example([8], [8])], pad_id=0)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_steps_of_a_run():
    def steps(batches, **settings):
        return total_steps(batches, make_config("o", **({"max_steps": None} | settings)))

    assert steps(5, gradient_accumulation=2) == 3  # the last step of an epoch may be smaller
    assert steps(5, gradient_accumulation=2, epochs=2) == 6
    assert steps(4, gradient_accumulation=1, epochs=0.5) == 2
    assert steps(5, gradient_accumulation=8, epochs=0.1) == 1
    assert steps(5, max_steps=9) == 9


def test_log_has_every_window_and_the_schedule(tmp_path):
    data = make_data()
    run = trainer(tmp_path / "run", data, eval_data=data, eval_every=3, log_every=2, scheduler="linear")
    run.train()
    rows = read_log(tmp_path / "run" / "log.jsonl")
    training, evaluation = ([r for r in rows if key in r] for key in ("loss", "eval_loss"))
    assert [r["step"] for r in training] == [2, 4, 6, 7]
    assert [r["step"] for r in evaluation] == [3, 6, 7]
    # Warm-up over 2 steps, then down to 0 at step 7: the rate that step n was taken with.
    rates = [(n / 2 if n < 2 else (7 - n) / 5) * 1e-2 for n in range(7)]
    assert [r["lr"] for r in training] == pytest.approx([rates[1], rates[3], rates[5], rates[6]])
    assert all(r["tokens_per_second"] > 0 and r["memory_mib"] > 0 for r in training)


def test_logged_loss_is_the_token_weighted_mean_of_its_window(tmp_path):
    logs = []
    for every in (1, 7):
        run = trainer(tmp_path / str(every), log_every=every)
        run.train()
        logs.append(read_log(tmp_path / str(every) / "log.jsonl"))
    single, window = logs
    lowest, highest = min(r["loss"] for r in single), max(r["loss"] for r in single)
    assert len(window) == 1 and lowest < window[0]["loss"] < highest


def test_plot_is_a_png(tmp_path):
    data = make_data()
    result = trainer(tmp_path / "run", data, eval_data=data, plot=True, max_steps=2).train()
    assert result.plot_path == tmp_path / "run" / "loss_curve.png"
    assert result.plot_path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("setting", "module", "advice"),
    [
        ("plot", "matplotlib", r"minipeft\[demo\]"),
        ("tensorboard", "torch.utils.tensorboard", "pip install tensorboard"),
    ],
)
def test_missing_extra_is_told_before_anything_is_written(tmp_path, monkeypatch, setting, module, advice):
    monkeypatch.setitem(sys.modules, module, None)
    run = trainer(tmp_path / "run", **{setting: True})
    with pytest.raises(MissingExtraError, match=advice):
        run.train()
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_row(tmp_path, monkeypatch):
    scalars, closed = [], []

    class SummaryWriter:
        def __init__(self, directory):
            assert directory == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, key, value, step):
            scalars.append((key, value, step))

        def close(self):
            closed.append(True)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    trainer(tmp_path / "run", tensorboard=True).train()
    logged = [("loss", row["loss"], row["step"]) for row in read_log(tmp_path / "run" / "log.jsonl")]
    assert [scalar for scalar in scalars if scalar[0] == "loss"] == logged and closed


def test_a_run_is_never_overwritten(tmp_path):
    trainer(tmp_path / "run", max_steps=2).train()
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    with pytest.raises(OutputDirError, match="already holds a run: resume it"):
        trainer(tmp_path / "run", max_steps=2).train()
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


def test_output_dir_with_other_files_is_fine_and_a_file_is_not(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    check_output_dir(tmp_path)
    with pytest.raises(OutputDirError, match="is not a directory"):
        check_output_dir(tmp_path / "notes.txt")


def test_keep_last_prunes_the_oldest(tmp_path):
    trainer(tmp_path / "run", max_steps=5, save_every=1, keep_last=2).train()
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-5"]


def poison(model, at_forward, value=math.nan):
    """Make the loss non-finite from the given forward pass on."""
    calls = []

    def hook(module, inputs, output):
        calls.append(1)
        return output * value if len(calls) >= at_forward else output

    model.lm_head.register_forward_hook(hook)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_before_it_does_damage(tmp_path, value):
    model = make_model()
    poison(model, at_forward=10, value=value)  # the second micro-batch of step 5
    run = trainer(tmp_path / "run", model=model)
    with pytest.raises(NonFiniteError, match="stopped at step 5: the loss is nan") as raised:
        run.train()
    assert raised.value.step == 5
    assert all(p.isfinite().all() for p in trained_parameters(model).values())
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_non_finite_gradient_stops_too(tmp_path):
    model = make_model()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = trained_parameters(model)
    with pytest.raises(NonFiniteError, match="step 1: the gradient norm is"):
        trainer(tmp_path / "run", model=model).train()
    assert all(torch.equal(p, before[n]) for n, p in trained_parameters(model).items())


def interrupt(model, at_forward, number=signal.SIGINT):
    calls = []

    def hook(module, inputs, output):
        # The loss tries a model once, in eval mode, on whether it may make the logits itself.
        calls.extend([1] * module.training)
        if module.training and len(calls) == at_forward:
            signal.raise_signal(number)

    # Not on the head: with a hook there the loss takes all logits at once, which are other bits.
    return model.model.register_forward_hook(hook)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("at_forward", "step"), [(1, 0), (9, 4), (10, 5)])
def test_signal_saves_and_stops(tmp_path, number, at_forward, step):
    handlers = [signal.getsignal(s) for s in StopSignal.signals]
    model = make_model(dropout=0.1)
    interrupt(model, at_forward, number)
    with pytest.raises(TrainingInterrupted, match=f"{number.name} after step {step} of 7; saved") as raised:
        trainer(tmp_path / "run", model=model).train()
    assert raised.value.exit_code == 130
    assert raised.value.checkpoint == tmp_path / "run" / f"checkpoint-{step}"
    assert raised.value.checkpoint.is_dir()
    assert [signal.getsignal(s) for s in StopSignal.signals] == handlers


def test_second_signal_is_not_caught(monkeypatch):
    sent = []
    monkeypatch.setattr("minipeft.train.run.os.kill", lambda pid, number: sent.append(number))
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.received is signal.SIGTERM and not sent
        signal.raise_signal(signal.SIGINT)
        assert sent == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
            signal.raise_signal(signal.SIGTERM)
            assert stop.received is signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_model_without_adapter_is_refused(tmp_path):
    model = make_model(adapter=False).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: attach an adapter"):
        trainer(tmp_path / "run", model=model)


def test_run_json_tells_the_settings(tmp_path):
    trainer(tmp_path / "run", max_steps=2).train()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["max_steps"] == 2 and run["config"]["lr"] == 1e-2
    assert run["identity"]["adapter 'default' 'r'"] == 4

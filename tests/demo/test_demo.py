"""The demo's own code, from data to report, on a tiny random model."""

import json
import math

import pytest
import torch
from tiny_folder import save_model, write_jsonl
from transformers import AutoModelForCausalLM

from minipeft import PeftModel
from minipeft.commands.cli import main
from minipeft.demo import demo
from minipeft.demo.demo import DemoConfig, run_demo
from minipeft.train.errors import TrainingInterrupted


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Which letter comes first? A tiny model can learn that in a few steps."""
    records = [{"prompt": f"{c}{i}{d} ->", "completion": f" {c}"} for c in "ab" for d in "xyz" for i in range(40)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "d.jsonl", records)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, data):
    output = tmp_path_factory.mktemp("demo") / "out"
    said = []
    with pytest.MonkeyPatch.context() as patch:
        # Twice as much is at the edge: there the result hangs on how sums are rounded.
        patch.setattr(demo, "LEARNING_RATE", 1e-2)
        config = DemoConfig(output, str(base), str(data), steps=40, held_out_rows=40)
        result = run_demo(config, said.append)
    return output, result, "\n".join(said)


def test_it_learns_and_reports_both_measurements(finished):
    _, result, said = finished
    assert result.after.loss < result.before.loss - 0.5
    assert result.after.accuracy > max(result.before.accuracy, result.majority)
    assert result.after.perplexity == pytest.approx(math.exp(result.after.loss))
    p = result.after.accuracy
    assert result.after.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 40))
    for part in ("[6/6]", "in 16 bits", "in 4 bits", "before", "after", "always the same label", "wanted", "adapter"):
        assert part in said
    assert f"{100 * result.after.accuracy:.1f} %" in said and f"{result.after.loss:.3f}" in said


def test_sizes_are_those_of_the_files_and_models(finished, base):
    output, result, _ = finished
    parameters = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert result.parameters == parameters
    assert result.bytes_16bit == 2 * parameters
    assert result.adapter_bytes == sum(f.stat().st_size for f in (output / "adapter").iterdir())
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter")
    assert result.trainable == sum(p.numel() for name, p in adapter.named_parameters() if "lora_" in name)


def test_everything_is_on_disk(finished):
    output, result, _ = finished
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "report.json").read_text())
    assert report["after"]["accuracy"] == result.after.accuracy
    held_out = (output / "held_out.jsonl").read_text().splitlines()
    train = (output / "train.jsonl").read_text().splitlines()
    assert (len(train), len(held_out)) == (200, 40) and not set(train) & set(held_out)


def test_eval_and_generate_give_the_same_as_the_demo_said(finished, base, capsys):
    output, result, said = finished
    where = ["--model", str(base), "--quantize", "nf4", "--adapter", str(output / "adapter")]
    dtype = "bfloat16" if "embeddings in bfloat16" in said else "float32"
    assert main(["eval", *where, "--dtype", dtype, "--data", str(output / "held_out.jsonl")]) == 0
    loss = float(capsys.readouterr().out.split()[1])
    assert loss == pytest.approx(result.after.loss, abs=0.02)
    command = next(line for line in said.splitlines() if line.startswith("  minipeft generate"))
    assert str(output / "adapter") in command and "--raw" in command


def test_free_text_is_measured_by_its_loss_alone(base, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": f"{i} is a number"} for i in range(30)])
    said = []
    result = run_demo(DemoConfig(tmp_path / "out", str(base), str(data), steps=2), said.append)
    assert result.after.accuracy is None and result.majority is None
    assert result.after.loss < result.before.loss
    assert "accuracy" not in "\n".join(said)


def test_an_interrupted_demo_says_what_to_do(base, data, tmp_path, monkeypatch):
    def stopped(self, resume=False):
        raise TrainingInterrupted("stopped; go on with --resume", tmp_path / "checkpoint-1", 1)

    monkeypatch.setattr(demo.Trainer, "train", stopped)
    with pytest.raises(TrainingInterrupted, match=r"remove .*out before starting it again"):
        run_demo(DemoConfig(tmp_path / "out", str(base), str(data), steps=2), lambda line: None)


def test_the_command_runs_it(base, data, tmp_path, capsys):
    arguments = ["demo", "--model", str(base), "--data", str(data), "--steps", "1", "--seed", "3"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "Use it:" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["seed"] == 3
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_bfloat16_is_used_only_where_the_processor_has_it(base, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU multiplies bfloat16")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("minipeft_kernels.arithmetic.arithmetic_dtype", lambda wanted, device: dtype)  # noqa: B023
        assert demo.load_quantized(str(base)).dtype == dtype, native

"""`minipeft memory`: what is predicted without weights, beside what PyTorch's profiler sees allocated in a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ok, refused
from tiny_families import FAMILIES
from tiny_folder import save_model
from torch.profiler import ProfilerActivity, profile
from transformers import T5Config

from minipeft import LoraConfig, get_peft_model
from minipeft.files import size
from minipeft.show.memory import GhostRun
from minipeft.train import load_base_model
from minipeft.train.batches import Batch, collate
from minipeft.train.config import TrainConfig
from minipeft.train.encoding import Example
from minipeft.train.errors import ModelLoadError
from minipeft.train.loss import training_loss_sum
from minipeft.train.methods import attach, method_config
from minipeft.train.models import training_mode
from minipeft.train.schedule import make_optimizer

ROWS, TOKENS = 4, 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each of three families, large enough that matrices are what counts."""
    made = {}
    for name in ("Llama", "GPT-2", "Gemma 3"):
        sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1000}
        family = dataclasses.replace(FAMILIES[name], changes=FAMILIES[name].changes | sizes)
        made[name] = tmp_path_factory.mktemp("models") / name.replace(" ", "")
        family.build().save_pretrained(made[name])
    return made


def batch(padded: bool) -> Batch:
    """Rows of which every token is learned; if padded, the last is shorter."""
    lengths = [TOKENS] * (ROWS - 1) + [TOKENS - padded]
    return collate([Example([1] * length, [1] * length) for length in lengths], pad_id=0)


def measured(config: TrainConfig, rows: Batch) -> int:
    """The most bytes that tensors take in the second step of a run, by the profiler's record of every allocation."""
    model = load_base_model(config.model, quantize=config.quantize, device="cpu")
    model = attach(model, method_config(config))
    optimizer = make_optimizer(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        training_loss_sum(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with training_mode(model, config.gradient_checkpointing):
        step()
        states: list[Any] = [value for state in optimizer.state.values() for value in state.values()]
        held = [*model.parameters(), *model.buffers(), *states, *rows.inputs.values(), rows.labels]
        before = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return sum(before.values()) + peak


@pytest.mark.parametrize(
    ("family", "method", "checkpointing", "quantize"),
    [
        ("Llama", "lora", False, "nf4"),
        ("Llama", "prefix", True, None),
        ("Llama", "bottleneck", True, "nf4"),
        ("GPT-2", "lora", True, None),
        ("GPT-2", "prefix", False, "nf4"),
        ("GPT-2", "bottleneck", False, None),
        ("Gemma 3", "lora", True, "nf4"),
        ("Gemma 3", "prefix", True, "nf4"),
        ("Gemma 3", "bottleneck", False, None),
    ],
)
def test_the_peak_is_what_a_run_then_allocates(folders, family, method, checkpointing, quantize):
    config = TrainConfig(
        *(str(folders[family]), "-", "-", method), quantize=quantize, gradient_checkpointing=checkpointing
    )
    run = GhostRun(config)
    padded = family != "GPT-2"
    step = run.step(ROWS, TOKENS, padded)
    assert step.peak == pytest.approx(measured(config, batch(padded)), rel=0.05)
    assert step.kinds["weights"] > step.kinds["adapter"] > 0


def test_settings_count(folders, tmp_path):
    def peak(more: dict[str, Any] | None = None, **settings: Any) -> Any:
        if "adapter" not in settings:
            settings["method_args"] = {"target_modules": ["q_proj"], **(more or {})}
        return GhostRun(TrainConfig(str(folders["Llama"]), "-", "-", **settings)).step(8, TOKENS)

    plain, dora = peak(), peak({"use_dora": True, "r": 32})
    assert dora.kinds["adapter"] > 3 * plain.kinds["adapter"] and dora.peak > plain.peak
    assert peak(dtype="bfloat16").kinds["weights"] == pytest.approx(plain.kinds["weights"] / 2, rel=0.01)
    # A second micro-batch is computed while the gradients of the first are held.
    assert peak(gradient_accumulation=2).kinds["gradients"] == plain.kinds["adapter"]
    # Forward, backward, update, and nothing of what was run before the step.
    phases = [phase for phase, _ in plain.history]
    assert phases == sorted(phases, key=["forward", "backward", "update"].index)
    assert plain.kinds["optimizer"] >= 2 * plain.kinds["adapter"]
    # An adapter to be trained further, of which the config alone counts.
    model = get_peft_model(load_base_model(folders["Llama"], device="cpu"), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    further = peak(adapter=str(tmp_path)).kinds
    assert further["adapter"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    # So few tokens that the update, when all gradients are there, takes more than the rest.
    many = {"target_modules": ["q_proj"], "r": 512}
    short = GhostRun(TrainConfig(str(folders["Llama"]), "-", "-", method_args=many)).step(1, 2)
    assert short.phase == "update" and short.kinds["gradients"] == short.kinds["adapter"]


def test_a_model_that_asks_for_values_is_refused(folders):
    run = GhostRun(TrainConfig(str(folders["Llama"]), "-", "-"))
    run._model.model.norm.register_forward_hook(lambda module, args, out: out[:, (out > 0).any(-1)[0]])
    with pytest.raises(ModelLoadError, match="depends on values"):
        run.step(ROWS, TOKENS)


def test_the_command_says_what_fits(tmp_path):
    model = save_model(tmp_path / "model")
    page = tmp_path / "page.html"
    asked = ("memory", model, "--method-args", "{target_modules: [q_proj]}")
    told = json.loads(ok(*asked, "--tokens", 64, "--batch", 2, "--budget", "3MB", "--json", "--html", page))
    assert told["peak"] == sum(told["bytes"].values()) and told["trained"] < told["parameters"]
    run = GhostRun(TrainConfig(str(model), "-", "-", method_args={"target_modules": ["q_proj"]}))
    rows = told["largest_batch"]
    assert rows > 2 and run.step(rows, 64).peak == told["largest_batch_peak"] <= 3e6 < run.step(rows + 1, 64).peak
    html = page.read_text()
    assert "http" not in html.replace("http-equiv", "") and "<polygon" in html and "rows fit" in html
    text = ok(*asked, "--tokens", 2, "--batch", 1024, "--budget", "16GB")
    assert "1024  rows fit" in text and "more were not tried" in text
    text = ok(*asked, "--tokens", 8, "--method", "qlora", "--budget", "1kB")
    one = GhostRun(dataclasses.replace(run.config, method="qlora", quantize="nf4"))
    assert f"not even one row fits: its tensors take {size(one.step(1, 8).peak)}" in text and "activations" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "many"), "--budget must be a number of bytes"),
        (("--budget", "0GB"), "--budget must be a number of bytes"),
        (
            ("--tokens", "4096"),
            "--tokens (4096) exceeds the model's max_position_embeddings (256): set --tokens to 256",
        ),
        (("--budget", "-5MB"), "given after =, as in --option=-1"),
        (("--batch", "0"), "must be a whole number of 1 or greater"),
        (("--method", "lorra"), "unknown method"),
        (("--method-args", "{r: 0}"), "r"),
        (("--method-args", "{target_modules: [nothing]}"), "nothing"),
        (("--html", "no/such/folder/page.html"), "cannot write"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, said):
    model = tmp_path / "model"
    save_model(model)
    assert said in refused("memory", model, *arguments)
    assert "no model" in refused("memory", tmp_path)


def test_a_family_without_a_causal_model_is_named_alone(tmp_path):
    T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    for command in (("memory", tmp_path), ("inspect", tmp_path, "--tree"), ("trace", tmp_path, "--device", "cpu")):
        said = refused(*command)
        assert "no causal language model for a T5Config: expected a decoder" in said and len(said) < 400

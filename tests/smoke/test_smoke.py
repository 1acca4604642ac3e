"""All that the library does, on tiny models, in a minute or two: what is run on every supported set of versions.

Nothing here needs peft or bitsandbytes, which exist for few of those sets. Right numbers are formulas in float64, or
the plain model's. `pytest -m smoke` runs it, wherever minipeft is installed.
"""

import contextlib
import copy
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import randomize, some_ids
from tiny_decoders import tiny_decoder
from tiny_encoders import tiny_encoder
from tiny_folder import save_model, write_jsonl
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, Trainer, TrainingArguments

from minipeft import (
    BottleneckConfig,
    LoraConfig,
    NF4Config,
    PagedAdamW,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)
from minipeft.commands.cli import main
from minipeft.compat import checkpoint_activations
from minipeft.nf4 import NF4Linear

pytestmark = pytest.mark.smoke

METHODS: dict[str, Any] = {
    "lora": lambda task: LoraConfig(r=4, lora_alpha=16, task_type=task),
    "dora": lambda task: LoraConfig(r=4, lora_alpha=16, use_dora=True, task_type=task),
    "bottleneck": lambda task: BottleneckConfig.houlsby(bottleneck_size=8, task_type=task),
    "prefix": lambda task: PrefixTuningConfig(num_virtual_tokens=4, task_type=task),
    "prompt": lambda task: PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", task_type=task),
}
DECODERS = ("llama", "gpt2", "qwen3", "gemma3", "mixtral", "gptj")
ENCODERS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
LORA_UPDATE = 16 / 4  # lora_alpha / r


def base(family: str, packed: bool = False) -> Any:
    if family == "gptj":
        config = GPTJConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
        torch.manual_seed(0)
        model: Any = GPTJForCausalLM(config).eval()
    else:
        model = tiny_decoder(family) if family in DECODERS else tiny_encoder(family)
    return quantize_model(model, NF4Config()) if packed else model


def batch(family: str) -> dict[str, torch.Tensor]:
    ids = some_ids()
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if family == "bert" else ids}


def adapted(family: str, method: str, packed: bool = False) -> Any:
    model = get_peft_model(base(family, packed), METHODS[method](ENCODERS.get(family, "CAUSAL_LM")))
    randomize(model, scale=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    return model.eval()(**batch(family)).logits


def gradients(model: Any, family: str) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # the same dropout
    model.train()(**batch(family)).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_an_adapter_learns_is_saved_and_is_loaded(family: str, method: str, packed: bool, tmp_path: Path) -> None:
    """It lowers the loss, the base keeps its bits, disabled it is gone, and a fresh base gives the same logits with it.

    Its gradients are the same when activations are recomputed.
    """
    model = adapted(family, method, packed)
    before, plain = model(**batch(family)).loss.item(), logits(base(family, packed), family)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(4):
        model.train()(**batch(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.eval()(**batch(family)).loss.item() < before - 0.01
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base(family, packed).state_dict().items())
    with model.disable_adapter():
        assert torch.equal(logits(model, family), plain)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(family, packed), tmp_path)
    assert torch.equal(logits(again, family), logits(model, family))
    assert not torch.allclose(logits(model, family), plain, atol=1e-3)

    again = PeftModel.from_pretrained(base(family, packed), tmp_path, is_trainable=True)
    wanted = gradients(again, family)
    checkpoint_activations(again)
    for recomputed, kept in zip(gradients(again, family), wanted, strict=True):
        torch.testing.assert_close(recomputed, kept)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "nf4"])
def test_lora_is_its_formula_and_merges_to_it(packed: bool) -> None:
    """y = W x + s B A x in float64, unmerged, merged and unloaded."""
    model = adapted("llama", "lora", packed)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features)
    weight = (layer.dequantize() if packed else layer.weight).detach().double()
    update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * LORA_UPDATE
    torch.testing.assert_close(layer(x).double(), x.double() @ (weight + update).T, rtol=1e-5, atol=1e-5)
    before = logits(model, "llama")
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, "llama"), before, rtol=0, atol=2e-5)
    if not packed:
        torch.testing.assert_close(layer.weight.double(), weight + update, rtol=1e-6, atol=1e-6)


def test_experts_have_a_lora_each() -> None:
    """y of the adapted model is that of a model whose experts' weights hold W + s B A."""
    config = LoraConfig(r=2, lora_alpha=8, target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base("mixtral"), config)
    randomize(model, scale=0.1)
    before = logits(model, "mixtral")
    assert not torch.allclose(before, logits(base("mixtral"), "mixtral"), atol=1e-3)
    torch.testing.assert_close(logits(model.merge_and_unload(), "mixtral"), before, rtol=0, atol=2e-5)


def test_experts_in_four_bits_load_act_and_are_adapted_as_the_dequantized_ones(tmp_path: Path) -> None:
    base("mixtral").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=NF4Config()).eval()
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.uint8
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits(again, "mixtral"), logits(model, "mixtral"))
    config = LoraConfig(r=2, target_parameters=["experts.down_proj", "experts.gate_up_proj"], task_type="CAUSAL_LM")
    outputs = []
    for one in (again, model.dequantize()):
        torch.manual_seed(1)
        one = get_peft_model(one, copy.deepcopy(config))
        randomize(one, scale=0.1)
        outputs.append(logits(one.eval(), "mixtral"))
        outputs.append(logits(one.merge_and_unload(), "mixtral"))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_generation_is_the_greedy_choice_of_each_forward(family: str, method: str) -> None:
    """With a cache and left padding, beside one plain forward a token without either."""
    model = adapted(family, method)
    ids = some_ids(rows=1, tokens=5)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        made = model.generate(
            input_ids=padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 7:]
        for token in made:
            assert model(input_ids=ids, use_cache=False).logits[0, -1].argmax() == token
            ids = torch.cat([ids, token[None, None]], dim=1)


def test_four_bits_are_the_nearest_levels() -> None:
    """Each weight is its block's largest times the nearest of 16 levels (Dettmers et al. 2023, appendix E)."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 16, bias=False)
    blocks = linear.weight.detach().double().reshape(-1, 64)
    packed = quantize_model(torch.nn.ModuleList([linear]), NF4Config(double_quant=False, skip_modules=[]))[0]
    assert isinstance(packed, NF4Linear)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    got = packed.dequantize().double().reshape(-1, 64) / largest
    levels = got.round(decimals=5).unique()
    assert len(levels) == 16
    nearest = (blocks[:, :, None] / largest[:, :, None] - levels).abs().amin(dim=2)
    torch.testing.assert_close((got - blocks / largest).abs(), nearest, rtol=0, atol=2e-5)


def test_paged_adamw_is_torchs(tmp_path: Path) -> None:
    """The bits of each step's parameters beside `torch.optim.AdamW`'s, to rounding; its state goes on from a file."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(33, 7)), torch.nn.Parameter(torch.randn(65))]
    theirs = copy.deepcopy(ours)
    optimizers = PagedAdamW(ours, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_compiled_model_has_the_same_loss_and_gradients() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(base("llama"), backend="aot_eager")(**batch("llama"))
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} does not compile with torch {torch.__version__}: {error}")
    model = adapted("llama", "lora", packed=True)
    eager = [model(**batch("llama")).loss, *gradients(model.eval(), "llama")]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own doings
        again = [compiled(**batch("llama")).loss, *gradients(compiled, "llama")]
    for ours, plain in zip(again, eager, strict=True):
        torch.testing.assert_close(ours, plain)


def test_trainer_of_transformers_trains_resumes_and_saves(tmp_path: Path) -> None:
    class Texts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, list[int]]:
            ids = some_ids(rows=1, seed=index)[0].tolist()
            return {"input_ids": ids, "labels": ids}

    def trainer(steps: int) -> tuple[Any, Trainer]:
        model = adapted("llama", "lora")
        settings = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            lr_scheduler_type="constant", save_steps=2, use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        return model, Trainer(model, settings, train_dataset=Texts())

    whole, run = trainer(4)
    run.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    resumed, run = trainer(4)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, once), (_, twice) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(twice, once, msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, and records of words turned round."""
    place = tmp_path_factory.mktemp("smoke")
    words = ["abc", "cab", "bca", "acb"] * 4
    write_jsonl(place / "train.jsonl", [{"prompt": f"{word}?", "completion": f" {word[::-1]}"} for word in words])
    save_model(place / "model")
    return place


def command(*arguments: Any) -> str:
    """The output of a command that must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix", "prompt", "bottleneck"])
def test_the_command_line_trains_resumes_and_generates(method: str, folder: Path, tmp_path: Path) -> None:
    quick = ["--max-steps", "6", "--lr", "0.02", "--batch-size", "4", "--save-every", "3", "--log-every", "1"]
    quick += ["--optimizer", "paged_adamw", "--method-args", "{}" if "lora" not in method else "{r: 4}"]
    source = ["--model", folder / "model", "--method", method, "--data", folder / "train.jsonl", *quick]
    command("train", *source, "--output", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    adapter = ["--adapter", tmp_path / "run" / "adapter", *(["--quantize", "nf4"] if method == "qlora" else [])]
    text = command(
        "generate", "--model", folder / "model", *adapter, "--raw", "--prompt", "abc?", "--max-new-tokens", 4
    )
    assert text
    command("eval", "--model", folder / "model", *adapter, "--data", folder / "train.jsonl")
    if method in ("lora", "qlora"):
        command("merge", "--model", folder / "model", *adapter, "--output", tmp_path / "merged")
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_nothing_that_is_called_is_deprecated(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """transformers says so in its log, Python in warnings, which are errors here."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for method in ("lora", "prefix", "prompt"):
            model = adapted(family, method)
            if method == "lora":
                gradients(prepare_model_for_kbit_training(model), family)
            model.eval().generate(input_ids=some_ids(), max_new_tokens=3, pad_token_id=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]

"""Models with experts in NF4: quantized in memory and while they load, saved, sharded, read again, dequantized."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import edit_config, edit_tensors, logits, saved
from safetensors import safe_open
from tiny_families import FAMILIES, OTHERS, Family
from transformers import AutoModelForCausalLM

from minipeft.errors import PeftWarning
from minipeft.nf4 import NF4Linear, NF4Weight, quantized_sizes
from minipeft.nf4.experts import NF4Experts
from minipeft.nf4.hf import BitsAndBytesConfig, NF4Config, quantize_model

# Gated and concatenated; per-expert files under other names; transposed, interleaved, with biases; beside a shared one.
MIXTURES = {
    **{name: FAMILIES[name] for name in ("Mixtral", "Qwen3-MoE")},
    **{name: OTHERS[name] for name in ("gpt_oss", "qwen2_moe", "phimoe")},
    "nemotron_h": Family(
        "nemotron_h",
        {
            **OTHERS["nemotron_h"].changes,
            **{"layers_block_type": ["moe", "attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "moe_latent_size": None},
        },
    ),
}
every_mixture = pytest.mark.parametrize("family", MIXTURES)


def stacked(model: Any) -> dict[str, NF4Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Experts)}


def weights_of_experts(model: Any) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.dim() == 3 and n.split(".")[-1] in NAMES}


NAMES = ("gate_up_proj", "up_proj", "down_proj")


def assert_same(got: Any, wanted: Any) -> None:
    """The same bytes, packed and not, and the same logits but for the order of MKL's sums, which follows addresses."""
    got_state, state = got.state_dict(), wanted.state_dict()
    assert got_state.keys() == state.keys()
    for name, tensor in state.items():
        assert got_state[name].dtype == tensor.dtype and torch.equal(got_state[name], tensor), name
    torch.testing.assert_close(logits(got), logits(wanted), rtol=1e-5, atol=1e-6)


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


@every_mixture
def test_experts_are_packed_one_by_one_and_nothing_else_of_them(family: str) -> None:
    dense = MIXTURES[family].build()
    model = quantize_model(copy.deepcopy(dense))
    modules = stacked(model)
    assert modules and not weights_of_experts(model)
    for name, weight in weights_of_experts(dense).items():
        path, _, leaf = name.rpartition(".")
        matrices = weight.transpose(1, 2) if modules[path].is_transposed else weight
        for e, matrix in enumerate(matrices.detach()):
            alone = NF4Weight.quantize(matrix.contiguous())
            expert = modules[path].packed_experts(leaf).expert(e)
            assert torch.equal(expert.codes, alone.codes) and torch.equal(expert.absmax, alone.absmax)
            assert torch.equal(expert.offset, alone.offset)
    for name, parameter in dense.named_parameters():
        if any(kind in name for kind in ("router", "mlp.gate.weight", "norm", "bias")):
            assert torch.equal(model.get_parameter(name), parameter), name


@every_mixture
def test_loading_gives_the_bytes_of_quantizing_in_memory(family: str, tmp_path: Path) -> None:
    folder = saved(MIXTURES[family].build(), tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        one_by_one = any(".experts.0." in key for key in file.keys())  # noqa: SIM118
    assert one_by_one == (family != "gpt_oss")
    wanted = quantize_model(load(folder))
    for config in (NF4Config(), BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")):
        model = load(folder, quantization_config=config)
        assert stacked(model).keys() == stacked(wanted).keys()
        if config.double_quant:
            assert_same(model, wanted)
    narrow = load(folder, quantization_config=NF4Config(), dtype=torch.bfloat16)
    assert {m.weight_dtype for m in stacked(narrow).values()} == {torch.bfloat16}


@every_mixture
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_saved_models_load_as_they_were(family: str, shards: str, tmp_path: Path) -> None:
    dense = saved(MIXTURES[family].build(), tmp_path / "dense")
    in_memory = quantize_model(MIXTURES[family].build(), NF4Config(blocksize=128))
    loaded = load(dense, quantization_config=NF4Config(double_quant=False))
    for name, model in {"in_memory": in_memory, "loaded": loaded}.items():
        folder = saved(model, tmp_path / name, max_shard_size=shards)
        assert len(list(folder.glob("*.safetensors"))) > 1 or shards == "5GB"
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["experts"] is True
        again = load(folder)
        assert_same(again, model)
        # What was read is written alike.
        assert_same(load(saved(again, tmp_path / f"{name}_again")), model)


@every_mixture
def test_dequantize_gives_the_plain_model_back(family: str, tmp_path: Path) -> None:
    dense = MIXTURES[family].build()
    kinds = {name: type(module) for name, module in dense.named_modules()}
    model = quantize_model(copy.deepcopy(dense))
    wanted = logits(model)
    assert model.num_parameters() == dense.num_parameters()
    assert model.get_memory_footprint() < 0.5 * dense.get_memory_footprint()
    model = model.dequantize()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert list(model.state_dict()) == list(dense.state_dict())
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    # A plain model, also on disk: its experts under the names of its family's files.
    assert torch.equal(logits(load(saved(model, tmp_path))), logits(model))


@every_mixture
def test_experts_stay_dense_where_that_is_asked_for(family: str, tmp_path: Path) -> None:
    dense = MIXTURES[family].build()
    folder = saved(dense, tmp_path / "dense")
    first, *others = {name.rpartition(".")[0] for name in weights_of_experts(dense)}
    one = next(name for name in weights_of_experts(dense) if name.endswith("down_proj"))
    for config, left in {
        "none": (NF4Config(experts=False), {first, *others}),
        "bnb": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", experts=False), {first, *others}),
        "module": (NF4Config(skip_modules=["lm_head", first]), {first}),
        "all": (NF4Config(skip_modules=["lm_head", "experts"]), {first, *others}),
    }.values():
        model = load(folder, quantization_config=config)
        assert {name.rpartition(".")[0] for name in weights_of_experts(model)} == left
        assert_same(quantize_model(load(folder), config), model)
        assert_same(load(saved(model, tmp_path / str(len(list(tmp_path.iterdir()))))), model)
    half = load(folder, quantization_config=NF4Config(skip_modules=["lm_head", one]))
    assert list(weights_of_experts(half)) == [one] and torch.equal(half.get_parameter(one), dense.get_parameter(one))
    assert_same(load(saved(half, tmp_path / "half")), half)


def test_a_checkpoint_that_does_not_speak_of_experts_has_dense_ones(tmp_path: Path) -> None:
    """As bitsandbytes writes them."""
    model = quantize_model(MIXTURES["Qwen3-MoE"].build(), NF4Config(experts=False))
    folder = saved(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["experts"]
    (folder / "config.json").write_text(json.dumps(config))
    again = load(folder)
    assert not stacked(again)
    assert_same(again, model)


def test_a_checkpoint_without_some_of_the_experts_is_refused_by_name(tmp_path: Path) -> None:
    for model, gone in {
        MIXTURES["gpt_oss"].build(): ("down_proj", "down_proj_bias"),
        quantize_model(MIXTURES["gpt_oss"].build()): ("down_proj", "down_proj_bias"),
    }.items():
        for name in gone:
            missing = f"model.layers.1.mlp.experts.{name}"
            folder = saved(model, tmp_path)
            edit_tensors(folder, lambda tensors, missing=missing: drop(tensors, missing))
            config = {} if hasattr(model, "hf_quantizer") else {"quantization_config": NF4Config()}
            with pytest.raises(ValueError, match=rf"\n  {missing}: it is not in the checkpoint"):
                load(folder, **config)


def drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    for key in [key for key in tensors if key == name or key.startswith(f"{name}.")]:
        del tensors[key]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    dense = quantize_model(MIXTURES["gpt_oss"].build(), NF4Config(experts=False))
    folder = saved(dense, tmp_path / "dense")
    edit_config(folder, experts=True)
    with pytest.raises(ValueError, match=r"experts.down_proj: it is dense in the checkpoint, but .* experts to false"):
        load(folder)
    with pytest.raises(TypeError, match="experts must be True or False, not 'no'"):
        NF4Config(experts="no")  # type: ignore[arg-type]
    model = MIXTURES["gpt_oss"].build()
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj holds NaN or infinity"):
        quantize_model(model)
    assert not stacked(model)


def test_a_patched_forward_that_would_read_codes_is_refused() -> None:
    model = MIXTURES["gpt_oss"].build()
    experts = model.model.layers[1].mlp.experts
    own = experts.forward
    experts.forward = lambda *args: own(*args) * 2
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts has a forward of its own"):
        quantize_model(model)
    assert not stacked(model)
    assert len(stacked(quantize_model(model, NF4Config(skip_modules=["layers.1.mlp.experts"])))) == 1


def test_experts_of_classes_without_the_interface_stay_dense_and_a_warning_names_them() -> None:
    model = OTHERS["llama4_text"].build()
    numbers = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 3)
    with pytest.warns(PeftWarning, match=rf"^Llama4TextExperts stays dense, {numbers:,} numbers") as caught:
        quantize_model(model)
    assert len([w for w in caught if issubclass(w.category, PeftWarning)]) == 1


def test_training_goes_through_packed_experts() -> None:
    """Gradients of what is trained beside them are those of the dequantized model."""
    model = quantize_model(MIXTURES["Mixtral"].build())
    plain = copy.deepcopy(model).dequantize()
    batch = MIXTURES["Mixtral"].batch()
    gradients = []
    for one in (model, plain):
        one.requires_grad_(False)
        trained = [p for n, p in one.named_parameters() if "norm" in n or "gate.weight" in n or "embed" in n]
        for p in trained:
            p.requires_grad_()
        one.train()(**batch).loss.backward()
        gradients.append([p.grad for p in trained])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@every_mixture
def test_what_is_printed_of_the_sizes_is_counted(family: str) -> None:
    dense = MIXTURES[family].build().bfloat16()
    linear = {n for n, m in quantize_model(copy.deepcopy(dense)).named_modules() if isinstance(m, NF4Linear)}
    model = quantize_model(copy.deepcopy(dense))
    sizes = quantized_sizes(model)
    experts = weights_of_experts(dense)
    assert sizes.experts.weights == len(experts) and sizes.experts.numbers == sum(w.numel() for w in experts.values())
    assert sizes.experts.before == 2 * sizes.experts.numbers
    # 4.127 bits a number, and two tables a stack; small ones have more nested scales a number.
    state = model.state_dict()
    stored = {key: t for key, t in state.items() if any(key == w or key.startswith(f"{w}.") for w in experts)}
    held = sum(t.nbytes for key, t in stored.items() if "quant_state" not in key)
    offsets = 4 * sum(w.shape[0] for w in experts.values())
    assert sizes.experts.after == held + offsets
    assert sizes.layers.weights == len(linear)
    assert sizes.dense.numbers + sizes.layers.numbers + sizes.experts.numbers == dense.num_parameters()
    assert sizes.dense.after + sizes.layers.after + sizes.experts.after == sum(
        t.nbytes
        for t in (*model.parameters(), *(b for m in model.modules() for b in m._buffers.values() if packs(m, b)))
    )
    lines = str(sizes).splitlines()
    assert lines[1].startswith(f"{len(experts)} stacks of experts in 4 bits: {sizes.experts.numbers:,} numbers, ")
    assert " kB -> " in lines[1] and len(lines) == 3
    assert str(quantized_sizes(dense)).startswith("the rest stays as it is")


def packs(module: Any, buffer: Any) -> bool:
    return buffer is not None and isinstance(module, NF4Linear | NF4Experts)

"""LoftQ: the error of quantization falls with each round, and the plain base model stays what it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from torch import nn

from minipeft import (
    LoftQConfig,
    LoraConfig,
    NF4Config,
    PeftModel,
    get_peft_model,
    quantize_model,
    replace_lora_weights_loftq,
)
from minipeft.lora.variants import loftq
from minipeft.nf4 import NF4Weight

CONFIG: dict[str, Any] = {"r": 8, "lora_alpha": 24, "target_modules": ["q_proj", "down_proj"]}


def config(rounds: int = 1, **changes: Any) -> LoraConfig:
    start = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_iter=rounds)}
    return LoraConfig(**{**CONFIG, **start, **changes})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(some_ids()).logits


def some_weight() -> torch.Tensor:
    return torch.randn(192, 256, generator=torch.Generator().manual_seed(0)) * 0.02


def test_error_falls_with_every_round() -> None:
    weight = some_weight()
    errors = [(weight - NF4Weight.quantize(weight, double_quant=False).dequantize()).norm().item()]
    for rounds in (1, 2, 3, 5):
        packed, lora_A, lora_B = loftq(weight, r=16, scaling=2.0, rounds=rounds)
        errors.append((weight - packed.dequantize() - 2.0 * lora_B @ lora_A).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.88 * errors[0] and errors[-1] < 0.95 * errors[1]


@pytest.mark.parametrize("r", [4, 16, 32])
def test_more_rounds_are_never_worse(r: int) -> None:
    weight = some_weight()[:64, :64]
    errors = []
    for rounds in range(1, 9):
        packed, lora_A, lora_B = loftq(weight, r=r, scaling=2.0, rounds=rounds)
        errors.append((weight - packed.dequantize() - 2.0 * lora_B @ lora_A).norm().item())
    assert errors == sorted(errors, reverse=True)


def test_rounds_are_algorithm_1() -> None:
    weight, low = some_weight(), torch.zeros(192, 256)
    for _ in range(3):
        quantized = NF4Weight.quantize(weight - low, double_quant=False).dequantize()
        left, values, right = torch.linalg.svd(weight - quantized)
        low = left[:, :16] @ values[:16].diag() @ right[:16]
    packed, lora_A, lora_B = loftq(weight, r=16, scaling=0.5, rounds=3)
    # Rounding apart, which moves a weight in thousands that lies between two codes.
    assert ((packed.dequantize() - quantized).abs() > 1e-5).float().mean() < 1e-3
    errors = [weight - packed.dequantize() - 0.5 * lora_B @ lora_A, weight - quantized - low]
    torch.testing.assert_close(errors[0].norm(), errors[1].norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("plain", [tiny_llama, lambda: tiny_llama(attention_bias=True), tiny_gpt2])
def test_the_quantized_weight_acts_and_the_plain_one_stays(plain: Any) -> None:
    untouched, model = plain(), plain()
    gpt2 = hasattr(model, "transformer")
    model = get_peft_model(model, config(2, target_modules=["c_attn"] if gpt2 else ["q_proj"]))
    randomize(model)
    layer = model.transformer.h[0].attn.c_attn if gpt2 else model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    lora_A, lora_B = layer.factors("default")
    weight = layer.lora_base["default"].dequantize() + 3 * lora_B @ lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
    adapted, base = logits(model), logits(untouched)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert model.unload().state_dict().keys() == untouched.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in untouched.state_dict().items())


def test_start_is_nearer_to_the_plain_model_than_quantization_alone() -> None:
    plain = logits(tiny_llama(initializer_range=0.2))
    targets = {"r": 16, "target_modules": "all-linear"}
    away = [(logits(quantize_model(tiny_llama(initializer_range=0.2), NF4Config())) - plain).norm()]
    for rounds in (1, 5):
        model = get_peft_model(tiny_llama(initializer_range=0.2), config(rounds, **targets))
        away.append((logits(model) - plain).norm())
    assert away[2] < away[1] < away[0]


def test_it_learns_and_holds_no_copy_of_the_base_in_its_file(tmp_path: Path) -> None:
    model, ids = get_peft_model(tiny_llama(), config()).train(), some_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    assert not any("lora_base" in name for name in model.state_dict())
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("rounds", [1, 3])
def test_saved_and_loaded_over_the_plain_model_is_exact(rounds: int, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(rounds))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))
    packed = quantize_model(tiny_llama(), NF4Config(double_quant=False))
    if rounds == 1:  # plain quantization is what it was trained on
        dense = [model.get_submodule(n).lora_base["default"].dequantize() for n in ("model.layers.0.mlp.down_proj",)]
        torch.testing.assert_close(packed.model.layers[0].mlp.down_proj.dequantize(), dense[0])
        loaded = PeftModel.from_pretrained(packed, tmp_path)
        layers = [m.model.layers[0].mlp.down_proj for m in (loaded, model)]
        x = torch.randn(2, 96)
        torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="needs the weights before quantization"):
            PeftModel.from_pretrained(packed, tmp_path)


def test_two_cannot_act_at_once_but_one_beside_plain_lora_can() -> None:
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("second", config())
    model.add_adapter("plain", LoraConfig(**CONFIG))
    randomize(model)
    with pytest.raises(ValueError, match=r"both train model\.layers\.0\.self_attn\.q_proj\.weight whole"):
        model.set_adapter(["default", "second"])
    model.set_adapter(["default", "plain"])
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 64)
    weight = layer.lora_base["default"].dequantize() + layer.delta_weight("default") + layer.delta_weight("plain")
    torch.testing.assert_close(layer(x), x @ weight.T)
    with pytest.raises(ValueError, match="'default' is LoftQ"):
        model.eval()(some_ids(2), adapter_names=["default", "plain"])
    with pytest.raises(ValueError, match="'default' cannot be combined"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "both")


def test_packed_layers_take_their_start_from_the_weights_before(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = get_peft_model(quantize_model(tiny_llama(), NF4Config()), LoraConfig(**CONFIG))
    seen: list[str] = []

    def keep_first(model: Any, name: str) -> bool:
        seen.append(name)
        return len(seen) == 1

    first, other = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.down_proj
    plain = tiny_llama().model.layers[0].self_attn.q_proj.weight.detach()
    before = (first.dense_weight() - plain).norm()
    replace_lora_weights_loftq(model, tmp_path, callback=keep_first)
    assert (first.merged_weight(("default",)) - plain).norm() < 0.8 * before
    assert not other.factors("default")[1].any() and len(seen) == 4
    replace_lora_weights_loftq(model, str(tmp_path))
    assert other.factors("default")[1].any()
    with pytest.raises(FileNotFoundError, match="give model_path"):
        replace_lora_weights_loftq(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no LoRA on an NF4 layer"):
        replace_lora_weights_loftq(get_peft_model(tiny_llama(), LoraConfig(**CONFIG)), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loftq_config": {}}, "'loftq' and loftq_config go together"),
        ({"loftq_config": {"loftq_bits": 8}}, r"loftq_bits must be 4 \(NF4\), got 8"),
        ({"loftq_config": {"loftq_iter": 0}}, "loftq_iter must be a positive whole number"),
        ({"use_dora": True}, "use_dora with init_lora_weights='loftq'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**arguments)


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is for linear layers, 'model\.embed_tokens' is not one"):
        get_peft_model(tiny_llama(), config(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="this layer is NF4 already"):
        get_peft_model(quantize_model(tiny_llama(), NF4Config()), config())


def test_one_round_over_a_packed_base_is_computed_as_plain_lora_is(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(quantize_model(tiny_llama(), NF4Config(double_quant=False)), tmp_path)
    assert model.model.layers[0].self_attn.q_proj.one_plain_adapter() is not None
    over_plain = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert over_plain.model.layers[0].self_attn.q_proj.one_plain_adapter() is None

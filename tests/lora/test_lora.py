"""LoRA layers against the formulas of their papers, in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from torch import nn

from minipeft import LoraConfig, get_peft_model
from minipeft.nf4 import NF4Linear


class OneLayer(nn.Module):
    """A model with a single layer called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, **config: Any) -> Any:
    """`layer` alone under LoRA, its adapter moved away from the start (the same way for the same shapes)."""
    torch.manual_seed(3)
    model = get_peft_model(OneLayer(layer), LoraConfig(**{"r": 3, "target_modules": ["layer"], **config})).eval()
    randomize(model, scale=0.3)
    return model


def factors(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    layer = model.layer
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_equation_3(rslora: bool, bias: bool) -> None:
    linear = nn.Linear(10, 7, bias=bias, dtype=torch.float64)
    plain = copy.deepcopy(linear)
    model = adapted(linear, lora_alpha=5, use_rslora=rslora)
    x = torch.randn(4, 6, 10, dtype=torch.float64)
    lora_A, lora_B = factors(model)
    scaling = 5 / math.sqrt(3) if rslora else 5 / 3
    torch.testing.assert_close(model(x), plain(x) + scaling * x @ lora_A.T @ lora_B.T)


@pytest.mark.parametrize("shape", [(10,), (1, 10), (4, 10), (2, 3, 10), (0, 10)])
def test_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    model = adapted(nn.Linear(10, 7, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    lora_A, lora_B = (f.clone().requires_grad_() for f in factors(model))
    expected = x @ model.layer.weight.T + model.layer.bias + (x @ lora_A.T @ lora_B.T) * 8 / 3
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), (x, lora_A, lora_B))
    layer = model.layer
    own = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    for ours, theirs in zip(torch.autograd.grad((model(x) * weight).sum(), own), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dora_is_the_papers_equation_5() -> None:
    linear = nn.Linear(10, 7, dtype=torch.float64)
    plain = copy.deepcopy(linear)
    model = adapted(linear, use_dora=True)
    lora_A, lora_B = factors(model)
    direction = plain.weight + 8 / 3 * lora_B @ lora_A
    magnitude = model.layer.lora_magnitude_vector["default"].weight.detach()
    weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ weight.T + plain.bias)


def test_dora_gradient_takes_the_length_as_a_constant() -> None:
    model = adapted(nn.Linear(10, 7, bias=False, dtype=torch.float64), use_dora=True)
    layer, x = model.layer, torch.randn(4, 10, dtype=torch.float64)
    lora_A, lora_B = (f.clone().requires_grad_() for f in factors(model))
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().clone().requires_grad_()
    direction = layer.weight + 8 / 3 * lora_B @ lora_A
    expected = x @ (magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()).T
    wanted = torch.autograd.grad(expected.square().sum(), (magnitude, lora_A, lora_B))
    own = (
        layer.lora_magnitude_vector["default"].weight,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
    )
    for ours, theirs in zip(torch.autograd.grad(model(x).square().sum(), own), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"init_lora_weights": "gaussian"}, {"bias": "all"}])
def test_start_is_the_identity(config: dict[str, Any]) -> None:
    for plain in (tiny_llama(attention_bias=True), tiny_gpt2()):
        before = plain(some_ids()).logits
        start = get_peft_model(plain, LoraConfig(target_modules="all-linear", **config))
        # DoRA divides a length by itself and multiplies it again: equal up to rounding.
        torch.testing.assert_close(start(some_ids()).logits, before, rtol=0, atol=1e-6 if config else 0)


def test_random_start_is_not_the_identity() -> None:
    model = tiny_llama()
    before = model(some_ids()).logits
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.equal(model(some_ids()).logits, before)


def test_dropout_falls_on_the_update_alone_and_only_in_training() -> None:
    model = adapted(nn.Linear(10, 7, dtype=torch.float64), lora_dropout=0.5)
    x = torch.ones(2000, 10, dtype=torch.float64)
    plain, clean = nn.functional.linear(x, model.layer.weight, model.layer.bias), model(x)
    noisy = model.train()(x)
    assert not torch.equal(noisy, clean)
    torch.testing.assert_close((noisy - plain).mean(0), (clean - plain).mean(0), rtol=0.1, atol=0.05)


def test_dropout_may_be_given_by_hand_to_an_adapter_without() -> None:
    model = adapted(nn.Linear(10, 7))
    x, names = torch.ones(200, 10), set(model.state_dict())
    clean = model(x)
    assert type(model.layer.lora_dropout["default"]) is nn.Identity
    assert torch.equal(model.train()(x), clean) and set(model.state_dict()) == names
    model.layer.lora_dropout["default"] = nn.Dropout(0.5)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), clean) and torch.equal(copy.deepcopy(model)(x), clean)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layer"]))
    assert set(model.layer.lora_dropout) == {"default", "other"}
    model.delete_adapter("other")
    assert set(model.layer.lora_dropout) == {"default"}
    layer = model.unload().layer
    assert type(layer) is nn.Linear and not hasattr(layer, "lora_dropout")


def test_embedding_update_is_a_column_of_a() -> None:
    embedding = nn.Embedding(11, 6, dtype=torch.float64)
    plain = copy.deepcopy(embedding)
    model = adapted(embedding)
    lora_A = model.layer.lora_embedding_A["default"].detach()
    lora_B = model.layer.lora_embedding_B["default"].detach()
    ids = torch.tensor([[0, 3], [10, 3]])
    table = plain.weight + 8 / 3 * (lora_B @ lora_A).T
    torch.testing.assert_close(model(ids), table[ids])


def test_scaled_embedding_scales_the_update_too() -> None:
    class Scaled(nn.Embedding):  # as Gemma's
        embed_scale = 3.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    model = adapted(Scaled(11, 6, dtype=torch.float64))
    ids = torch.arange(11)
    out = model(ids)
    model.merge_adapter()
    torch.testing.assert_close(model(ids), out)


def test_update_keeps_no_float32_copy_of_a_16_bit_input() -> None:
    linear = nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    model = adapted(linear)
    assert model.layer.lora_A["default"].weight.dtype is torch.float32
    x = torch.randn(5, 32, dtype=torch.bfloat16, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = model(x)
    assert out.dtype is torch.bfloat16
    kept = [t for t in saved if t.dtype is torch.float32 and t.shape == x.shape]
    assert not kept, "the input was kept in float32"


@pytest.mark.parametrize("under_autocast", [False, True])
def test_16_bit_layer_is_near_the_float64_result(under_autocast: bool) -> None:
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    exact = nn.Linear(64, 48, dtype=torch.float64)
    exact.load_state_dict(linear.state_dict())
    model = adapted(linear)
    lora_A, lora_B = (f.double() for f in factors(model))
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    expected = exact(wide) + 8 / 3 * wide @ lora_A.T @ lora_B.T
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
        out = model(x)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for ours, exactly in ((out, expected), (x.grad, wide.grad)):
        assert (ours.double() - exactly).norm() < 0.01 * exactly.norm()
    assert model.layer.lora_A["default"].weight.grad.dtype is torch.float32


@pytest.mark.parametrize("use_dora", [False, True])
def test_qlora_is_lora_on_the_dequantized_weight(use_dora: bool) -> None:
    linear = nn.Linear(128, 48)
    packed = NF4Linear.from_linear(linear)
    with torch.no_grad():
        linear.weight.copy_(packed.dequantize())
    quantized, dense = adapted(packed, use_dora=use_dora), adapted(linear, use_dora=use_dora)
    x = torch.randn(3, 128)
    torch.testing.assert_close(quantized(x), dense(x))
    for layer in (quantized, dense):
        layer(x).square().sum().backward()
    for ours, theirs in zip(quantized.parameters(), dense.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_patterns_set_rank_and_alpha_per_target() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 6}, alpha_pattern={"v_proj": 3}
    )
    assert config.settings_for("model.layers.0.self_attn.q_proj") == (4, 8, 2.0)
    assert config.settings_for("model.layers.1.self_attn.q_proj") == (2, 8, 4.0)
    assert config.settings_for("model.layers.1.self_attn.v_proj") == (6, 3, 0.5)
    # A key is the end of a dotted name, not of a word.
    assert config.settings_for("model.layers.1.self_attn.qv_proj") == (4, 8, 2.0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 2.5}, "r must be a positive integer, got 2.5"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] must be a positive integer, got -1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"bias": "some"}, "bias must be .* got 'some'"),
        ({"init_lora_weights": "corda"}, "'corda' is not supported by minipeft: it changes the base weights"),
        ({"init_lora_weights": "orthogonally"}, "init_lora_weights must be .* got 'orthogonally'"),
        (
            {"use_qalora": True},
            r"use_qalora=True\) is not supported by minipeft; leave use_qalora at its default \(False\)",
        ),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"use_qalora": True}, "use_qalora=True.* is not supported"),
        ({"kasa_config": {"beta": 1}}, "kasa_config=.* is not supported"),
        ({"task_type": "CHAT"}, "Invalid task type: 'CHAT'"),
        ({"layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
        ({"layers_to_transform": 1, "target_modules": ".*"}, "cannot be used when `target_modules` is a str"),
    ],
)
def test_config_refuses_what_it_cannot_do(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LoraConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be a finite number, got '0.1'"),
        ({"target_modules": 5}, "target_modules must be a list of names or a regular expression, got 5"),
        ({"target_modules": [1]}, r"target_modules must be a list of names .* got \[1\]"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of names, got 'lm_head'"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern key '\(' is not a regular expression"),
        ({"alpha_pattern": {"q": "1"}}, r"alpha_pattern\['q'\] must be a finite number"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a layer number or a list of them, got '1'"),
        ({"use_dora": "false"}, "use_dora must be true or false, got 'false'"),
    ],
)
def test_values_of_a_wrong_type_are_named(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LoraConfig(**arguments)


def test_padding_of_an_embedding_gets_no_gradient() -> None:
    model = adapted(nn.Embedding(11, 6, padding_idx=2, dtype=torch.float64))
    model(torch.tensor([[2, 2, 2, 3]])).square().sum().backward()
    gradient = model.layer.lora_embedding_A["default"].grad
    assert not gradient[:, 2].any() and gradient[:, 3].all()


def test_dropout_follows_the_mode_of_the_layer_that_it_is_added_to() -> None:
    for training in (False, True):
        model = OneLayer(nn.Linear(4, 4)).train(training)
        get_peft_model(model, LoraConfig(target_modules=["layer"], lora_dropout=0.5))
        assert model.layer.lora_dropout["default"].training is training


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_returns_may_be_changed_in_place(
    quantized: bool, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    # Llama 4 and Falcon go on so.
    net = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    if quantized:
        net[0] = NF4Linear.from_linear(net[0])
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    gradients = []
    for adapted in (False, True):
        model: Any = get_peft_model(net, LoraConfig(target_modules=["0"], **changes)) if adapted else net
        for in_place in (False, True):
            torch.manual_seed(0)
            y = model(x)
            y = y.mul_(2) if in_place else y * 2
            gradients.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[2], gradients[3])

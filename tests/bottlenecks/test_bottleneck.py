"""Bottleneck adapters against the formula of their papers, and beside the other things that a model can carry."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import randomize, some_ids, tiny_llama
from tiny_families import FAMILIES
from tolerances import TOLERANCES
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from minipeft import BottleneckConfig, LoraConfig, NF4Config, PeftModel, get_peft_model, quantize_model
from minipeft.bottleneck.layer import Bottleneck

ACTIVATIONS: dict[str, Any] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
}


class Part(nn.Module):
    """A part of a layer as attention modules are: called by name, with a tuple as its result."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 10, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, str]:
        return self.inner(hidden_states), "weights"


class OneLayer(nn.Module):
    """A model of one layer, `part`."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Any:
        return self.part(hidden_states=x)[0] if isinstance(self.part, Part) else self.part(x)


def adapted(part: nn.Module, **config: Any) -> Any:
    """`part` alone with an adapter that is away from its start."""
    settings = {"bottleneck_size": 3, "target_modules": ["part"], "hidden_size": 10, **config}
    model = get_peft_model(OneLayer(part), BottleneckConfig(**settings))
    randomize(model, scale=0.5)
    return model.eval()


def formula(state: dict[str, Tensor], x: Tensor, h: Tensor, config: Any) -> Tensor:
    """y = h + s Up(act(Down(LN?(h or x)))), written down plainly."""
    read = x if config.is_parallel else h
    if config.layer_norm:
        centered = read - read.mean(-1, keepdim=True)
        read = centered / (read.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        read = read * state["norm.weight"] + state["norm.bias"]
    middle = ACTIVATIONS[config.non_linearity](read @ state["down.weight"].T + state["down.bias"])
    scaling = state["scaling"] if config.scaling == "learned" else config.scaling
    return h + scaling * (middle @ state["up.weight"].T + state["up.bias"])


CASES: dict[str, dict[str, Any]] = {
    **{name: {"non_linearity": name} for name in ACTIVATIONS},
    "scaled": {"scaling": 4.0},
    "learned": {"scaling": "learned"},
    "layer_norm": {"layer_norm": True},
    "parallel": {"is_parallel": True},
    "everything": {"is_parallel": True, "layer_norm": True, "scaling": "learned", "non_linearity": "tanh"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["part", "linear"])
def test_output_and_gradients_are_those_of_the_formula(kind: str, case: str) -> None:
    part = Part() if kind == "part" else nn.Linear(6, 10, dtype=torch.float64)
    plain = copy.deepcopy(part)
    model = adapted(part, **CASES[case])
    network = model.part.bottleneck["default"]
    x = torch.randn(2, 5, 10 if kind == "part" else 6, dtype=torch.float64, requires_grad=True)
    state = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    h = plain(x)[0] if kind == "part" else plain(x)
    expected = formula(state, x, h, model.peft_config["default"])
    torch.testing.assert_close(model(x), expected)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), (x, *state.values()))
    got = torch.autograd.grad((model(x) * weight).sum(), (x, *network.parameters()))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["relu", "everything"])
def test_over_16_bits_the_adapter_computes_in_float32(case: str, dtype: torch.dtype) -> None:
    model = adapted(Part(dtype), **CASES[case])
    network = model.part.bottleneck["default"]
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    x = torch.randn(2, 5, 10, dtype=dtype)
    h = F.linear(x, model.part.inner.weight, model.part.inner.bias)
    state = dict(network.named_parameters())
    wide = formula({n: p.double() for n, p in state.items()}, x.double(), h.double(), model.peft_config["default"])
    out = model(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wide.to(dtype), **TOLERANCES[dtype])
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


def test_over_16_bits_no_float32_copy_of_the_activations_is_kept() -> None:
    model = get_peft_model(
        OneLayer(nn.Linear(100, 100, dtype=torch.bfloat16)),
        BottleneckConfig(bottleneck_size=3, layer_norm=True, scaling="learned", target_modules=["part"]),
    )
    x = torch.randn(7, 100, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert not [t for t in kept if t.dtype == torch.float32 and t.shape == (7, 100)]
    assert [t for t in kept if t.dtype == torch.bfloat16 and t.shape == (7, 100)]


def test_it_works_under_autocast() -> None:
    model = adapted(nn.Linear(10, 10), layer_norm=True)
    x = torch.randn(4, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    torch.testing.assert_close(out.float(), model(x), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_without_autocast_the_adapter_has_the_models_dtype() -> None:
    model = get_peft_model(tiny_llama().bfloat16(), BottleneckConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(some_ids(), labels=some_ids()).loss.backward()


def test_dropout_acts_in_training_alone() -> None:
    model = adapted(nn.Linear(10, 10), dropout=0.5)
    x = torch.randn(50, 10)
    assert torch.equal(model(x), model(x))
    update = model(x) - F.linear(x, model.part.weight, model.part.bias)
    dropped = model.train()(x) - F.linear(x, model.part.weight, model.part.bias)
    zero = dropped.abs() < 1e-6
    assert 0.4 < zero.float().mean() < 0.6
    torch.testing.assert_close(dropped[~zero], 2 * update[~zero], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "std", "largest"), [("bert", 0.02, 0.12), ("houlsby", 0.0088, 0.02)])
def test_other_starts_are_small_and_random(kind: str, std: float, largest: float) -> None:
    network = Bottleneck(BottleneckConfig(bottleneck_size=64), 256, 256, torch.device("cpu"), torch.float32)
    network.initialize(kind)
    for layer in (network.down, network.up):
        assert abs(layer.weight.std().item() / std - 1) < 0.05 and layer.weight.abs().max() <= largest
        assert not layer.bias.any()


# Beside other adapters


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(some_ids()).logits


@pytest.mark.parametrize("packed", [False, True])
def test_beside_lora_on_one_layer_the_order_of_attaching_changes_nothing(packed: bool) -> None:
    def build(first: str) -> Any:
        model = quantize_model(tiny_llama(), NF4Config()) if packed else tiny_llama()
        configs: dict[str, Any] = {
            "lora": LoraConfig(r=2, target_modules=["down_proj", "q_proj"]),
            "bottleneck": BottleneckConfig(target_modules=["down_proj", "self_attn"]),
        }
        model = get_peft_model(model, configs.pop(first), first)
        for name, config in configs.items():
            model.add_adapter(name, config)
            model.set_requires_grad(name)
        state = dict(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in state.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    one, two = build("lora"), build("bottleneck")
    outputs = []
    for active in ("lora", "bottleneck", ["lora", "bottleneck"]):
        one.set_adapter(active)
        two.set_adapter(active)
        assert torch.equal(logits(one), logits(two))
        outputs.append(logits(one))
    assert not any(torch.allclose(outputs[i], outputs[j], atol=1e-4) for i, j in ((0, 1), (0, 2), (1, 2)))
    one.merge_adapter(["lora"])
    torch.testing.assert_close(logits(one), outputs[0], rtol=0, atol=1e-5)
    one.unmerge_adapter()
    assert torch.equal(logits(one), outputs[2])
    one.delete_adapter("lora")
    assert torch.equal(logits(one), outputs[1])
    one.delete_adapter("bottleneck")
    base = quantize_model(tiny_llama(), NF4Config()) if packed else tiny_llama()
    assert torch.equal(logits(one), logits(base))


def test_unloading_leaves_the_plain_model() -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig.houlsby())
    randomize(model)
    plain = model.unload()
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in tiny_llama().named_modules()]
    assert type(plain) is LlamaForCausalLM and plain.state_dict().keys() == tiny_llama().state_dict().keys()
    assert torch.equal(logits(plain), logits(tiny_llama()))


def test_a_copied_model_is_independent() -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig.parallel())
    randomize(model)
    twin, before = copy.deepcopy(model), logits(model)
    model.unload()
    assert torch.equal(logits(twin), before)


def test_generation_with_a_cache_gives_what_it_gives_without() -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig.houlsby())
    randomize(model, scale=0.3)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": some_ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    with_cache = model.generate(**prompt, **settings)
    assert torch.equal(with_cache, model.generate(**prompt, **settings, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(with_cache, model.generate(**prompt, **settings))


def test_attention_weights_still_come_out() -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig.houlsby())
    model.set_attn_implementation("eager")
    attentions = model(some_ids(), output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 4, 9, 9)] * 2


def test_a_classifiers_head_is_trained_and_saved_beside_the_adapter(tmp_path: Any) -> None:
    family = FAMILIES["BERT classifier"]
    model = get_peft_model(family.build(), BottleneckConfig(task_type="SEQ_CLS"))
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bert", "classifier"} and model.peft_config["default"].modules_to_save == ["classifier"]
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**family.batch()).logits, model(**family.batch()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_through_a_float32_adapter_over_16_bits_are_the_formulas(dtype: torch.dtype) -> None:
    """Of the input and of every weight, against the same network in float64."""
    config = BottleneckConfig(reduction_factor=2, non_linearity="gelu", scaling="channel", layer_norm=True)
    net = Bottleneck(config, 16, 16, torch.device("cpu"), torch.float32)
    net.initialize("mam_adapter")
    randomize(net)
    exact = copy.deepcopy(net).double()
    x = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, y64 = net(x), exact(x64)
    assert y.dtype == torch.float32
    dy = torch.randn(2, 5, 16)
    y.backward(dy)
    y64.backward(dy.double())
    size = float(x64.grad.abs().max())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=torch.finfo(dtype).eps, atol=8e-3 * size)
    for name, parameter in net.named_parameters():
        right = exact.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.double(), right, rtol=1e-2, atol=1e-2 * float(right.abs().max()))

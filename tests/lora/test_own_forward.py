"""A layer with a forward of its own is adapted, not replaced: its forward gives the base output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minipeft import BottleneckConfig, LoraConfig, NF4Config, PeftModel, get_peft_model, quantize_model
from minipeft.mixins import plain_class
from minipeft.nf4 import NF4Linear

WIDTH = 16


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Rounded(nn.Linear):
    """A weight that is rounded at every call, as BitNet's is."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        return F.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Gated(nn.Linear):
    def forward(self, x: Tensor, gate: float = 1.0) -> Tensor:
        return super().forward(x) * gate


class ShiftedConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class ScaledNF4(NF4Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class ScaledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def wrapped(layer: nn.Module) -> nn.Module:
    """The layer with a forward on the instance, as accelerate's hooks set it."""
    own = layer.forward
    layer.forward = lambda x: own(2 * x) - 1  # type: ignore[method-assign]
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "a scaled linear layer": lambda: Scaled(WIDTH, WIDTH),
    "one with a rounded weight": lambda: Rounded(WIDTH, WIDTH, bias=False),
    "a subclass with another argument": lambda: Gated(WIDTH, WIDTH),
    "a Conv1D": lambda: ShiftedConv1D(WIDTH, WIDTH),
    "a 4-bit layer": lambda: ScaledNF4.from_linear(nn.Linear(WIDTH, WIDTH)),
    "an embedding": lambda: ScaledEmbedding(8, WIDTH),
    "a wrapped linear layer": lambda: wrapped(nn.Linear(WIDTH, WIDTH)),
    "a wrapped 4-bit layer": lambda: wrapped(NF4Linear.from_linear(nn.Linear(WIDTH, WIDTH))),
}


def net_and_input(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = make()
    is_table = isinstance(layer, nn.Embedding)
    return nn.Sequential(layer), torch.tensor([[1, 5, 7]]) if is_table else torch.randn(3, WIDTH)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_start_is_the_layer_s_own_output_and_the_update_is_added_to_it(make: Callable[[], nn.Module]) -> None:
    net, x = net_and_input(make)
    own = net(x)
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(x), own)
    lora_A, lora_B = model[0].factors("default")
    for factor in (lora_A, lora_B):
        nn.init.normal_(factor)
    rows = F.one_hot(x, 8).float() if isinstance(net[0], nn.Embedding) else x
    torch.testing.assert_close(model(x), own + model[0].scaling["default"] * rows @ lora_A.T @ lora_B.T)
    with model.disable_adapter():
        assert torch.equal(model(x), own)
    assert torch.equal(model.unload()(x), own)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"init_lora_weights": "pissa"}], ids=str)
def test_variants_start_at_the_layer_s_own_output(config: dict[str, Any]) -> None:
    net, x = net_and_input(lambda: Scaled(WIDTH, WIDTH))
    own = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], **config))
    torch.testing.assert_close(model(x), own)


class Written(nn.Linear):
    """W x + b, written out, as Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Pair(nn.Linear):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


MERGEABLE = {
    "W x + b": lambda: Written(WIDTH, WIDTH),
    "in 16 bits": lambda: Written(WIDTH, WIDTH).bfloat16(),
    "a shift": lambda: ShiftedConv1D(WIDTH, WIDTH),
    "a gate of one": lambda: Gated(WIDTH, WIDTH),
}
UNMERGEABLE = {
    **{name: LAYERS[name] for name in ("a scaled linear layer", "one with a rounded weight", "a 4-bit layer")},
    **{name: LAYERS[name] for name in ("an embedding", "a wrapped linear layer", "a wrapped 4-bit layer")},
    "a second input": lambda: Pair(WIDTH, WIDTH),
}


@pytest.mark.parametrize("make", MERGEABLE.values(), ids=MERGEABLE)
def test_a_forward_that_is_linear_in_the_weight_is_merged(make: Callable[[], nn.Module]) -> None:
    net, x = net_and_input(make)
    x = x.to(net[0].weight.dtype)
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B["default"].weight, std=0.1)
    acting = model(x)
    assert not torch.allclose(acting, make_again(make)(x))
    tolerance = 2e-5 if x.dtype == torch.float32 else 0.1
    torch.testing.assert_close(model.merge_and_unload()(x), acting, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["W x + b", "a shift"])
def test_dora_is_merged_into_w_x_plus_b_alone(name: str) -> None:
    net, x = net_and_input(MERGEABLE[name])
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    nn.init.normal_(model[0].lora_B["default"].weight, std=0.1)
    acting = model(x)
    if name == "W x + b":
        torch.testing.assert_close(model.merge_and_unload()(x), acting, rtol=0, atol=2e-5)
    else:
        with pytest.raises(ValueError, match="does more with its weight than"):
            model.merge_and_unload()


def make_again(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("make", UNMERGEABLE.values(), ids=UNMERGEABLE)
def test_another_is_refused_by_name_before_anything_changes(make: Callable[[], nn.Module]) -> None:
    net, _ = net_and_input(make)
    model: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = plain_class(net[0]).__name__
    with pytest.raises(ValueError, match=rf"0: .*\.{kind} does more with its weight than W x \+ b"):
        model.merge_and_unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model[0].merged


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "weight_norm of old": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("way", COMPUTED)
def test_a_weight_that_is_computed_at_every_call_is_adapted_as_pefts(
    way: str, kind: str, use_dora: bool, tmp_path: Path
) -> None:
    def net() -> Any:
        torch.manual_seed(0)
        layer = nn.Linear(WIDTH, WIDTH) if kind == "linear" else nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        return nn.ModuleDict({"layer": COMPUTED[way](layer)}).eval()

    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    x = x if kind == "linear" else x[..., None].repeat(1, 1, 5)
    config: dict[str, Any] = {"r": 2, "target_modules": ["layer"], "use_dora": use_dora, "init_lora_weights": False}
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**config)).eval()
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True).eval()
    both = (model["layer"], theirs.base_model.model["layer"])
    torch.testing.assert_close(both[0](x), both[1](x))
    for layer in both:
        layer(x).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        ours, other = (getattr(layer, name)["default"].weight.grad for layer in both)
        torch.testing.assert_close(ours, other)
    with pytest.raises(ValueError, match="layer: its weight is no parameter of its own now, but parametrized"):
        model.merge_and_unload()
    torch.testing.assert_close(model.unload()["layer"](x), net()["layer"](x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("way", COMPUTED)
def test_a_weight_that_is_computed_is_trained_whole_after_a_step(way: str) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), COMPUTED[way](nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(3, WIDTH)
    net(x).sum().backward()
    own = net.eval()(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])).eval()
    torch.testing.assert_close(model(x), own)
    model(x).square().sum().backward()
    trained = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


class Twofold(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x.sum()


class Named(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x)}


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("kind", [Twofold, Named])
def test_a_forward_that_returns_no_tensor_is_refused_by_name(kind: Any, changes: Any) -> None:
    x = torch.randn(2, WIDTH)
    layer = kind(WIDTH, WIDTH)
    plain = layer.requires_grad_(False)(x)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], **changes))
    kind_of_output = "tuple" if kind is Twofold else "dict"
    with pytest.raises(TypeError, match=rf"{kind.__name__} returned a {kind_of_output}.*exclude_modules"):
        model(x)
    with model.disable_adapter():
        assert repr(model(x)) == repr(plain)
    assert repr(model.unload()(x)) == repr(plain)


def test_arguments_reach_the_layer_s_own_forward() -> None:
    net, x = net_and_input(lambda: Gated(WIDTH, WIDTH))
    layer: Any = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))[0]
    torch.testing.assert_close(layer(x, gate=0.5), 0.5 * layer(x))


def test_a_wrapped_layer_is_wrapped_again_when_adapters_go() -> None:
    net, x = net_and_input(lambda: wrapped(nn.Linear(WIDTH, WIDTH)))
    wrapper, own = net[0].forward, net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    assert not torch.allclose(model(x), own)
    plain = model.unload()
    assert plain[0].forward is wrapper and type(plain[0]) is nn.Linear and torch.equal(plain(x), own)


def test_a_bottleneck_stands_after_a_wrapped_layer() -> None:
    net, x = net_and_input(lambda: wrapped(nn.Linear(WIDTH, WIDTH)))
    own = net(x)
    model: Any = get_peft_model(net, BottleneckConfig(target_modules=["0"], bottleneck_size=2))
    assert torch.equal(model(x), own)
    nn.init.ones_(model[0].bottleneck["default"].up.bias)
    torch.testing.assert_close(model(x), own + 1)


def test_plain_layers_of_a_quantized_model_take_the_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    from minipeft.lora import layer as module

    calls: list[int] = []
    linear = module.linear
    monkeypatch.setattr(module, "linear", lambda *args: calls.append(1) or linear(*args))
    net = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), NF4Config(skip_modules=["1"]))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    model(torch.randn(2, 64))
    assert len(calls) == 2

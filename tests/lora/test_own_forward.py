"""A layer with a forward of its own is adapted, not replaced: its forward gives the base output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minipeft import BottleneckConfig, LoraConfig, NF4Config, get_peft_model, quantize_model
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

"""Blocks in which LoRA acts otherwise."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from torch import nn

from minipeft import LoraConfig, get_peft_model
from minipeft.helpers import DoraCaching, disable_input_dtype_casting, rescale_adapter_scale
from minipeft.lora.variants import Dora


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers whose lengths were computed, one entry a time."""
    computed: list[Any] = []
    plain = Dora.length

    def length(self: Any, layer: Any, adapter: str) -> torch.Tensor:
        computed.append(layer)
        return plain(self, layer, adapter)

    monkeypatch.setattr(Dora, "length", length)
    return computed


def dora(model: Any, *targets: str) -> Any:
    adapted = get_peft_model(model, LoraConfig(target_modules=[*targets], use_dora=True)).eval()
    randomize(adapted, scale=0.3)
    return adapted


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(some_ids()).logits


@pytest.mark.parametrize(
    "make", [lambda: dora(tiny_llama(), "q_proj", "embed_tokens"), lambda: dora(tiny_gpt2(), "c_attn")]
)
def test_the_length_is_computed_once_inside_the_block(make: Any, lengths: list[Any]) -> None:
    model = make()
    expected = logits(model)
    a_call = len(lengths) // 1
    lengths.clear()
    logits(model)
    a_call = len(lengths)
    with DoraCaching():
        assert all(torch.equal(logits(model), expected) for _ in range(3))
    assert len(lengths) == 2 * a_call
    assert torch.equal(logits(model), expected)
    assert len(lengths) == 3 * a_call
    with DoraCaching():
        model.train()
        logits(model)
        logits(model)
    assert len(lengths) == 5 * a_call


def test_whatever_is_written_inside_the_block_counts(lengths: list[Any]) -> None:
    model = dora(tiny_llama(), "q_proj")
    layer = model.model.layers[0].self_attn.q_proj
    with DoraCaching():
        logits(model)
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(2)
            layer.weight.add_(0.01)
        with rescale_adapter_scale(model, 0.5):
            inside = logits(model)
        after = logits(model)
    with rescale_adapter_scale(model, 0.5):
        assert torch.equal(inside, logits(model))
    assert torch.equal(after, logits(model))


def test_caching_is_turned_on_for_good_and_off_again(lengths: list[Any]) -> None:
    model = dora(tiny_llama(), "q_proj")
    DoraCaching()(enabled=True)
    try:
        logits(model)
        lengths.clear()
        logits(model)
        assert not lengths
        with DoraCaching(enabled=False):
            logits(model)
        assert lengths
    finally:
        DoraCaching()(enabled=False)
    assert not Dora.caching


def test_hooks_that_cast_weights_meet_uncast_inputs_inside_the_block() -> None:
    def widen(module: Any, inputs: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float()

    config = LoraConfig(target_modules=["first"], modules_to_save=["last"], init_lora_weights=False)
    parts: Any = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), last=nn.Linear(4, 4)))
    model = get_peft_model(parts, config).half()
    plain = copy.deepcopy(model).float()
    # A hook for each module with parameters, as diffusers' layerwise casting has: the copies' too.
    for module in [*model.modules()]:
        module.register_forward_pre_hook(widen)
    x = torch.randn(3, 4)
    with disable_input_dtype_casting(model, active=False), pytest.raises(RuntimeError, match="same dtype"):
        model(x)
    model.half()
    with disable_input_dtype_casting(model):
        torch.testing.assert_close(model(x), plain(x))
    model.half()
    with pytest.raises(RuntimeError, match="same dtype"):
        model(x)

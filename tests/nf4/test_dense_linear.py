"""The layers that stay dense in a quantized model: what `nn.Linear` would have given, whatever multiplies."""

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn
from torch.nn.utils import prune

from minipeft import LoraConfig, NF4Config, get_peft_model, quantize_model
from minipeft.nf4.dense import DenseLinear
from minipeft_kernels.linear.op import linear


def pair(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, DenseLinear]:
    """A layer and the same as a `DenseLinear`; large enough for the faster library."""
    plain = nn.Linear(512, 4096, bias=bias).to(dtype)
    kept = copy.deepcopy(plain)
    kept.__class__ = DenseLinear
    assert isinstance(kept, DenseLinear)
    return plain, kept


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the products that go another way than `nn.Linear`'s: to the operation, with its own backward."""
    made: list[torch.dtype] = []

    def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        made.append(x.dtype)
        return linear(x, w, bias)

    monkeypatch.setattr("minipeft.nf4.dense.linear", product)
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_is_right_in_both_directions(
    products: list[torch.dtype], dtype: torch.dtype, bias: bool
) -> None:
    plain, kept = pair(dtype, bias)
    for layer in (plain, kept):
        layer.weight.requires_grad_(False)
    x, dy = torch.randn(3, 512).to(dtype), torch.randn(3, 4096).to(dtype)
    results = []
    for layer in (plain.double(), kept):
        to = layer.weight.dtype
        own = x.to(to, copy=True).requires_grad_()
        y = layer(own)
        results.append((y, *torch.autograd.grad(y, [own, *([layer.bias] if bias else [])], dy.to(to))))
    assert len(products) == 1
    for right, got in zip(*results, strict=True):
        assert got.dtype == dtype
        size = float(right.detach().abs().max())
        torch.testing.assert_close(got.double(), right, rtol=0, atol=size * (1e-5 if dtype == torch.float32 else 2**-7))


def test_a_trained_layer_and_one_under_autocast_are_plain(products: list[torch.dtype]) -> None:
    plain, kept = pair()
    x = torch.randn(2, 512)
    for layer in (plain, kept):
        layer(x).sum().backward()
    assert torch.equal(plain.weight.grad, kept.weight.grad)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), kept(x)) and kept(x).dtype == torch.bfloat16
    assert not products
    with torch.no_grad():
        torch.testing.assert_close(plain(x), kept(x))
    assert products == [torch.float32]


def test_x_of_another_dtype_is_refused_as_ever() -> None:
    _, kept = pair()
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        kept(torch.randn(1, 512).bfloat16())


def test_a_weight_that_is_made_at_every_call_is_multiplied_as_ever() -> None:
    for make in (nn.utils.parametrizations.weight_norm, lambda m: prune.random_unstructured(m, "weight", amount=0.5)):
        _, kept = pair()
        make(kept)
        x = torch.randn(2, 512)
        with torch.no_grad():
            torch.testing.assert_close(kept(x), nn.functional.linear(x, kept.weight, kept.bias))


def quantized() -> Any:
    return quantize_model(tiny_llama(), NF4Config())


def test_a_quantized_model_keeps_its_head_so_and_gives_it_back() -> None:
    plain, model = tiny_llama(), quantized()
    assert type(model.lm_head) is DenseLinear and isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight is model.get_output_embeddings().weight
    assert [n for n in model.state_dict() if "lm_head" in n] == [n for n in plain.state_dict() if "lm_head" in n]
    assert type(copy.deepcopy(model).lm_head) is DenseLinear
    assert type(model.dequantize().lm_head) is nn.Linear


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_merging_leaves_no_layer_of_ours(targets: list[str]) -> None:
    model = get_peft_model(quantized(), LoraConfig(r=4, target_modules=targets))
    assert {type(m) for m in model.merge_and_unload().modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_the_head_can_be_adapted_and_trained() -> None:
    model = get_peft_model(quantized(), LoraConfig(r=4, target_modules=["lm_head"]))
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None and "lora_B" in n]
    model.unload()
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(quantized(), config)
    model(input_ids=ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None and "modules_to_save" in n]

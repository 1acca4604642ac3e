"""A model with adapters equals the same model in float64 at every level that this processor has, dense and packed."""

from typing import Any

import pytest
import torch
from native_weights import count_calls, needs_library
from tiny import some_ids, tiny_llama
from torch import Tensor, nn

from minipeft import LoraConfig, get_peft_model
from minipeft.nf4 import NF4Config, NF4Linear, quantize_model
from minipeft_kernels import arithmetic, native

pytestmark = [needs_library, pytest.mark.usefixtures("compiled")]


def adapted(kind: str, dtype: torch.dtype) -> Any:
    """A Llama of two layers, packed into NF4 or not, with LoRA in every layer."""
    # 64 columns are whole blocks, which compiled code multiplies; 96 are not, and are multiplied by torch.
    model: Any = tiny_llama(intermediate_size=96).to(dtype)
    if kind == "nf4":
        quantize_model(model, NF4Config())
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def in_float64(model: Any) -> Any:
    """A dense model of the same numbers in float64, with the same adapter."""
    wide = adapted("dense", torch.float64).double()
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, module in wide.named_modules():
            own = layers[name]
            if isinstance(module, nn.Linear) and isinstance(own, NF4Linear):
                module.weight.copy_(own.dequantize(torch.float32))
    named = dict(wide.named_parameters())
    state = {name: p.detach().double() for name, p in model.named_parameters() if p.shape == named[name].shape}
    wide.load_state_dict(state, strict=False)
    return wide


def step(model: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, the gradient of every trained parameter, and the logits of one token without a gradient."""
    ids = some_ids()
    logits = model.train()(input_ids=ids).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[:1, :1]).logits
    return loss.detach(), gradients, logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", ["nf4", "dense"])
def test_a_training_step_and_a_token_equal_float64(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, tolerance: float, level: int
) -> None:
    # Where oneDNN multiplies, small products too.
    monkeypatch.setattr(arithmetic, "LEAST", 0)
    model = adapted(kind, dtype)
    calls = count_calls(monkeypatch)
    loss, gradients, logits = step(model)
    expected = set() if kind == "dense" else {"minipeft_decode"}
    if kind == "nf4" and level != native.SCALAR:
        expected |= {"minipeft_product", "minipeft_thin"}
    assert set(calls) == expected
    right_loss, right, right_logits = step(in_float64(model))
    torch.testing.assert_close(loss, right_loss, rtol=tolerance / 10, atol=0)
    assert gradients.keys() == right.keys() and len(right) == 28
    for name, gradient in right.items():
        assert (gradients[name].double() - gradient).norm() <= tolerance * gradient.norm(), name
    assert (logits.double() - right_logits).norm() <= tolerance * right_logits.norm()

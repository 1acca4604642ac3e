"""The operations as torch's own: opcheck, torch.compile without graph breaks, names."""

import re
from typing import Any

import pytest
import torch
from stacks import stack_of
from tiny import randomize, some_ids, tiny_llama
from torch import Tensor
from torch.autograd import forward_ad

import minipeft.kernels
from minipeft import LoraConfig, get_peft_model, inject_adapter_in_model
from minipeft.nf4 import NF4Config, NF4Linear, NF4Weight, quantize_model
from minipeft_kernels.adamw.eight_bit import initial_state
from minipeft_kernels.linear.op import linear, linear_reference

# The interpreter computes in numpy, which warns where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HYPER = (1, 1e-2, 0.9, 0.99, 1e-8, 0.1, False)


def some_arguments_of_experts(dtype: torch.dtype, double: bool) -> dict[str, tuple[Any, ...]]:
    """Three experts of 48 x 128, of which the second has no rows; the last of the seven rows belongs to nobody."""
    stack, dense = stack_of(torch.randn(3, 48, 128), double), torch.randn(3, 48, 128).to(dtype)
    x, dy, offsets = (
        torch.randn(7, 128, dtype=dtype),
        torch.randn(7, 48, dtype=dtype),
        torch.tensor([2, 2, 6], dtype=torch.int32),
    )
    lora_A, lora_B, low = torch.randn(3, 4, 128), torch.randn(3, 48, 4), torch.randn(7, 4)
    trained = [t.clone().requires_grad_() for t in (x, lora_A, lora_B)]
    numbers = (0.5, dtype, torch.float32)
    return {
        "experts_linear of NF4": (trained[0], offsets, None, None, *numbers, *stack),
        "experts_linear of NF4 with LoRA": (trained[0], offsets, *trained[1:], *numbers, *stack),
        "experts_linear with LoRA": (trained[0], offsets, *trained[1:], *numbers, dense),
        "experts_linear, the update alone": (trained[0], offsets, *trained[1:], *numbers, None),
        "experts_linear_backward of NF4 with LoRA": (
            *(dy, offsets, x, lora_A, lora_B, low, *numbers, [True, False, True]),
            *stack,
        ),
        "experts_linear_backward with LoRA": (
            *(dy, offsets, x, lora_A, lora_B, low, *numbers, [True, True, False]),
            dense,
        ),
    }


def some_arguments(dtype: torch.dtype, double: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation, in each of its forms; those that are differentiable need gradients."""
    w = NF4Weight.quantize(torch.randn(48, 128), 64, double)
    dense = torch.randn(48, 128).to(dtype)
    x, dy = torch.randn(2, 3, 128, dtype=dtype), torch.randn(2, 3, 48, dtype=dtype)
    lora_A, lora_B, low, bias = torch.randn(4, 128), torch.randn(48, 4), torch.randn(6, 4), torch.randn(48)
    trained = [t.clone().requires_grad_() for t in (x, bias, lora_A, lora_B)]
    numbers = (0.5, dtype, torch.float32)
    params = [torch.randn(5, 7).to(dtype), torch.randn(300).to(dtype)]
    grads = [torch.randn_like(p) for p in params]
    wide = [[torch.zeros(p.shape) for p in params] for _ in range(2)]
    narrow = map(list, zip(*map(initial_state, params), strict=True))
    return {
        "nf4_quantize": (torch.randn(7, 9).to(dtype), 64),
        "quantize_absmax": (torch.rand(300),),
        "nf4_dequantize": (dtype, *w.packed()),
        "linear of NF4": (*trained[:2], None, None, *numbers, *w.packed()),
        "linear_backward of NF4": (dy, None, None, None, None, *numbers, [True, False, False], *w.packed()),
        "linear of NF4 with LoRA": (*trained, *numbers, *w.packed()),
        "linear_backward of NF4 with LoRA": (dy, x, lora_A, lora_B, low, *numbers, [True, False, True], *w.packed()),
        "linear": (*trained[:2], None, None, *numbers, dense),
        "linear_backward": (dy, None, None, None, None, *numbers, [True, False, False], dense),
        "linear with LoRA": (*trained, *numbers, dense),
        "linear_backward with LoRA": (dy, x, lora_A, lora_B, low, *numbers, [True, False, True], dense),
        "linear, the update alone": (trained[0], None, *trained[2:], *numbers, None),
        "linear_backward, the update alone": (
            *(dy.float(), x, lora_A, lora_B, low, *numbers, [True, True, True], None),
        ),
        **some_arguments_of_experts(dtype, double),
        "adamw_": (params, grads, *wide, *HYPER),
        "adamw_8bit_": (params, grads, *narrow, *HYPER),
    }


def operation(name: str) -> Any:
    return getattr(torch.ops.minipeft, re.split(r"[ ,]", name)[0]).default


@pytest.mark.parametrize("name", some_arguments(torch.float32, True))
@pytest.mark.parametrize(("dtype", "double"), [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(name: str, dtype: torch.dtype, double: bool) -> None:
    torch.library.opcheck(operation(name), some_arguments(dtype, double)[name])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", some_arguments(torch.float32, True))
def test_fake_results_are_shaped_as_the_kernels_results(name: str) -> None:
    torch.library.opcheck(
        operation(name), some_arguments(torch.bfloat16, True)[name], test_utils=["test_schema", "test_faketensor"]
    )


def test_every_public_operation_is_exported() -> None:
    names = {re.split(r"[ ,]", name)[0] for name in some_arguments(torch.float32, True)}
    assert names - set(minipeft.kernels.__all__) == {"linear_backward", "experts_linear_backward"}


def test_an_operation_without_a_gradient_is_not_recorded() -> None:
    w = torch.randn(64, 64, requires_grad=True)
    codes, absmax = torch.ops.minipeft.nf4_quantize(w, 64)
    assert not codes.requires_grad and not absmax.requires_grad


def losses_and_gradients(model: Any, call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    ids = some_ids()
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def packed_layer() -> Any:
    """A 4-bit layer with an adapter that does something; nothing is trained."""
    layer = NF4Linear.from_linear(torch.nn.Linear(128, 48, bias=False))
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), torch.nn.Sequential(layer))
    torch.nn.init.normal_(model[0].lora_B["default"].weight)
    return model.requires_grad_(False)


# torch's own rules for derivatives are scripted when the first dual number is made.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("recorded", [False, True])
def test_packed_layers_have_forward_derivatives(recorded: bool) -> None:
    model, x, tangent = packed_layer(), torch.randn(3, 128), torch.randn(3, 128)
    for layer in (model[0], NF4Linear.from_linear(torch.nn.Linear(128, 48))):
        with torch.no_grad():
            exact = layer(x + tangent).double() - layer(x).double()  # the layers are linear
        with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
            y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(y.primal, layer(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y.tangent.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_view_of_the_other_sign_is_read_so() -> None:
    model, x = packed_layer(), torch.randn(1, 128)
    with torch.no_grad():
        assert torch.equal(model(torch._neg_view(x)), model(-x))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_tiny_qlora_llama_compiles_without_graph_breaks(autocast: bool) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    quantize_model(model, NF4Config())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, gradients = losses_and_gradients(model, model)
        compiled_loss, compiled_gradients = losses_and_gradients(model, compiled)
    torch.testing.assert_close(compiled_loss, loss)
    assert len(gradients) == 28 and gradients.keys() == compiled_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient)


def test_a_compiled_layer_takes_any_number_of_rows_in_one_graph() -> None:
    torch._dynamo.reset()
    layer = torch.nn.Sequential()
    layer.add_module("q_proj", NF4Linear.from_linear(torch.nn.Linear(128, 48)))
    layer = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.compiler.set_stance("default"):
        for rows in (2, 5, 17):
            x = torch.randn(rows, 128, requires_grad=True)
            (expected,) = torch.autograd.grad(layer(x).sum(), x)
            y = compiled(x)
            torch.testing.assert_close(y, layer(x))
            (dx,) = torch.autograd.grad(y.sum(), x)
            torch.testing.assert_close(dx, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("size", [64, 1200])
def test_dense_products_have_forward_derivatives(recorded: bool, size: int) -> None:
    x, tangent, w, bias = torch.randn(2, size), torch.randn(2, size), torch.randn(size, size), torch.randn(size)
    lora = (torch.randn(4, size), torch.randn(size, 4), 0.5)
    with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
        for given in (None, lora):
            y = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, tangent), w, bias, given))
            exact = linear_reference(tangent.double(), w.double())
            if given is not None:
                exact += 0.5 * tangent.double() @ given[0].T.double() @ given[1].T.double()
            torch.testing.assert_close(y.tangent.double(), exact, rtol=1e-4, atol=1e-4 * size**0.5)

"""NF4Linear as a module: what it computes, what casts and moves leave alone, what it saves and refuses to load."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from nf4_golden import golden
from tolerances import TOLERANCES
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft.nf4.linear import SCALES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(n: int = 48, k: int = 128, bias: bool = True, dtype: torch.dtype = torch.float32, **kwargs: Any) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(k, n, bias=bias, dtype=dtype), **kwargs)


def dense(module: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.double()
    return nn.functional.linear(x.double(), module.dequantize(torch.float64), bias)


def assert_same(a: NF4Linear, b: NF4Linear) -> None:
    ours, theirs = a.nf4_weight(), b.nf4_weight()
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, theirs.tensors()[name]), name
    for name in ("blocksize", "nested_blocksize", "shape", "dtype"):
        assert getattr(ours, name) == getattr(theirs, name)
    x = torch.randn(2, a.in_features)
    assert torch.equal(a(x), b(x))


# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128,), (5, 128), (2, 3, 128), (0, 128)])
def test_forward_and_gradients_equal_the_dense_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    module = layer(bias=bias)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert y.dtype == dtype and x.grad is not None
    torch.testing.assert_close(y.double(), dense(module, x), **TOLERANCES[dtype])
    dx = dy.double() @ module.dequantize(torch.float64)
    torch.testing.assert_close(x.grad.double(), dx, **TOLERANCES[dtype])
    if module.bias is not None:
        db = dy.double().reshape(-1, 48).sum(0)
        torch.testing.assert_close(module.bias.grad.double(), db, **TOLERANCES[dtype])


def test_the_golden_layer_is_reproduced() -> None:
    linear = nn.Linear(128, 48)
    linear.weight.data, linear.bias.data = golden("linear.W"), golden("linear.bias")
    module = NF4Linear.from_linear(linear)
    assert torch.equal(module.weight.view(-1), golden("linear.packed"))
    assert torch.equal(module.absmax, golden("linear.absmax"))
    assert torch.equal(module.dequantize(), golden("linear.Wdq"))
    x = golden("linear.x").requires_grad_()
    y = module(x)
    y.backward(golden("linear.g"))
    torch.testing.assert_close(y, golden("linear.y"), **TOLERANCES[torch.float32])
    torch.testing.assert_close(x.grad, golden("linear.grad_x"), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_bitsandbytes_does(dtype: torch.dtype) -> None:
    linear = nn.Linear(128, 64)
    theirs = bnb.nn.LinearNF4(128, 64)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    module = NF4Linear.from_linear(linear)
    x = torch.randn(5, 128).to(dtype).requires_grad_()
    y, expected = module(x), theirs(x)
    torch.testing.assert_close(y, expected, **TOLERANCES[dtype])
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, x, dy)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, x, dy)[0], **TOLERANCES[dtype])


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_in_the_inputs_dtype_whatever_the_arithmetic(
    dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    module = layer(compute_dtype=compute_dtype)
    x = torch.randn(5, 128).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    looser = max((dtype, compute_dtype), key=lambda d: TOLERANCES[d]["rtol"])
    torch.testing.assert_close(y.double(), dense(module, x), **TOLERANCES[looser])


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_under_autocast_the_output_is_in_autocasts_dtype(compute_dtype: torch.dtype | None) -> None:
    module = layer(compute_dtype=compute_dtype)
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), dense(module, x), **TOLERANCES[torch.bfloat16])
    expected = module.dequantize(torch.float64).sum(0).expand(5, 128)
    torch.testing.assert_close(x.grad.double(), expected, **TOLERANCES[torch.bfloat16])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert module(x).dtype == torch.float32


def test_autocast_does_not_reach_into_the_arithmetic() -> None:
    module = layer(compute_dtype=torch.float32)
    x = torch.randn(5, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert torch.equal(y, module(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    first, second = layer(96, 128), layer(32, 96)
    x = torch.randn(5, 128, requires_grad=True)
    y = second(torch.relu(first(x)))
    expected = torch.autograd.grad(y.sum(), x)[0]
    again = checkpoint(lambda t: second(torch.relu(first(t))), x, use_reentrant=use_reentrant)
    again.sum().backward()
    assert torch.equal(y, again) and torch.equal(x.grad, expected)


# torch.compile itself instantiates the autograd function, and warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compile_traces_it_whole() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 128, requires_grad=True)
    y, again = module(x), compiled(x)
    torch.testing.assert_close(y, again)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(again.sum(), x))


def test_only_the_bias_is_trained() -> None:
    module = layer()
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]
    before = module.nf4_weight().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(torch.randn(5, 128)).sum().backward()
    optimizer.step()
    assert all(torch.equal(t, before.tensors()[name]) for name, t in module.nf4_weight().tensors().items())


def test_an_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last dimension \(64\) must be in_features \(128\)"):
        layer()(torch.ones(4, 64))
    with pytest.raises(TypeError, match=r"got torch\.int64"), torch.autocast("cpu", dtype=torch.bfloat16):
        layer()(torch.ones(4, 128, dtype=torch.int64))


def test_another_compute_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match=r"compute_dtype .* got torch\.float64"):
        NF4Linear(8, 8, compute_dtype=torch.float64)


# Making it


@pytest.mark.parametrize("double_quant", [True, False])
def test_from_linear_holds_the_quantized_weight_and_the_same_bias(double_quant: bool) -> None:
    linear = nn.Linear(100, 63, dtype=torch.bfloat16).eval()
    module = NF4Linear.from_linear(linear, blocksize=32, double_quant=double_quant)
    w = NF4Weight.quantize(linear.weight, 32, double_quant)
    assert torch.equal(module.weight, w.codes) and torch.equal(module.dequantize(), w.dequantize())
    assert module.dequantize().dtype == torch.bfloat16
    assert module.bias is linear.bias and not module.training
    assert not module.weight.requires_grad


def test_a_new_layer_is_zero() -> None:
    module = NF4Linear(100, 63)
    assert torch.equal(module.dequantize(), torch.zeros(63, 100))
    assert torch.equal(module(torch.randn(2, 100)), torch.zeros(2, 63))


def test_nf4_weight_shares_the_modules_tensors() -> None:
    module = layer()
    w = module.nf4_weight()
    assert w.codes.data_ptr() == module.weight.data_ptr() and w.absmax is module.absmax


def test_set_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(128, 48\) does not fit a layer of shape \(48, 128\)"):
        layer(48, 128).set_weight(NF4Weight.quantize(torch.randn(128, 48)))


def test_repr_tells_sizes_and_bits() -> None:
    text = repr(layer(1024, 1024))
    for part in ("in_features=1024", "out_features=1024", "bias=True", "blocksize=64", "4.14 bits a weight"):
        assert part in text


# Casts and moves


CASTS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_cast_leaves_codes_and_scales_alone(cast: str, double_quant: bool) -> None:
    module = layer(double_quant=double_quant)
    before = module.nf4_weight().clone()
    CASTS[cast](nn.Sequential(module))
    for name, tensor in module.nf4_weight().tensors().items():
        assert tensor.dtype == before.tensors()[name].dtype and torch.equal(tensor, before.tensors()[name])
    assert module.bias is not None and module.bias.dtype != torch.float32


def test_a_move_takes_everything_along_whatever_the_cast() -> None:
    moved = layer().to("meta", torch.bfloat16)
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved.absmax.dtype == torch.uint8 and moved.nested_absmax.dtype == torch.float32


def test_a_deep_copy_is_equal_and_apart() -> None:
    module = layer()
    twin = copy.deepcopy(module)
    assert_same(module, twin)
    assert twin.weight.data_ptr() != module.weight.data_ptr()
    twin.absmax.zero_()
    assert module.absmax.any()


# On disk


NAMES = {
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "bias",
}


def test_the_state_dict_has_bitsandbytes_names() -> None:
    assert set(nn.Sequential(layer()).state_dict()) == {f"0.{name}" for name in NAMES}
    single = layer(double_quant=False, bias=False).state_dict()
    assert set(single) == {name for name in NAMES if "nested" not in name} - {"bias"}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_loads(assign: bool, double_quant: bool) -> None:
    source, target = layer(double_quant=double_quant), layer(double_quant=double_quant)
    pointer = target.weight.data_ptr()
    result = target.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(source, target)
    # As torch does: copied into place, or taken over.
    assert target.weight.data_ptr() == (source.weight.data_ptr() if assign else pointer)


@pytest.mark.parametrize("assign", [True, False])
def test_loading_adopts_the_stored_blocks_and_when_assigned_the_dtype(assign: bool) -> None:
    source = layer(dtype=torch.bfloat16, blocksize=128, double_quant=False)
    for target in (layer(), layer(blocksize=32), layer(double_quant=False)):
        target.load_state_dict(source.state_dict(), assign=assign)
        assert_same(source if assign else copy.deepcopy(source).float(), target)
        assert target.nested_absmax is None and "nested_absmax" not in dict(target.named_buffers())
    if not assign:
        assert target.weight.data_ptr() != source.weight.data_ptr()


def test_a_layer_on_device_meta_is_filled_by_assignment() -> None:
    source = layer()
    target = NF4Linear(128, 48, device="meta")
    with torch.device("meta"):
        also = NF4Linear(128, 48)
    for module in (target, also):
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
        assert set(module.state_dict()) == NAMES
        assert module(torch.randn(5, 128, device="meta")).shape == (5, 48)
        module.load_state_dict(source.state_dict(), assign=True)
        assert_same(source, module)


def test_a_layer_made_empty_on_a_device_is_filled_by_copy() -> None:
    source = layer()
    target = NF4Linear(128, 48, device="meta").to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    assert_same(source, target)


def test_copying_to_device_meta_is_refused() -> None:
    with pytest.raises(RuntimeError, match="assign=True"):
        NF4Linear(128, 48, device="meta").load_state_dict(layer().state_dict())


def test_from_linear_on_device_meta_stays_there() -> None:
    module = NF4Linear.from_linear(nn.Linear(128, 48, device="meta"))
    assert module.weight.is_meta and module.weight.shape == (48 * 64, 1)


def test_the_state_of_bitsandbytes_own_layer_loads() -> None:
    linear = nn.Linear(128, 64)
    theirs = bnb.nn.LinearNF4(128, 64)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    module = NF4Linear(128, 64)
    module.load_state_dict(theirs.state_dict())
    expected = bnb.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state)
    assert torch.equal(module.dequantize(), expected)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_missing_tensor_is_named(name: str) -> None:
    state = nn.Sequential(layer()).state_dict()
    del state[f"0.{name}"]
    with pytest.raises(RuntimeError, match=f"0.{name}"):
        nn.Sequential(layer()).load_state_dict(state)


def test_all_missing_is_strict_alone() -> None:
    module = layer()
    result = module.load_state_dict({}, strict=False)
    assert set(result.missing_keys) == NAMES
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})


def test_an_unexpected_tensor_is_named() -> None:
    state = layer().state_dict() | {"weight.zeros": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.zeros"):
        layer().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        layer(bias=False).load_state_dict(layer().state_dict())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (layer(128, 48).state_dict(), r"shape \(128, 48\) does not fit a layer of shape \(48, 128\)"),
        (layer(48, 64).state_dict(), r"shape \(48, 64\) does not fit a layer of shape \(48, 128\)"),
        (nn.Linear(128, 48).state_dict(), "weight is a dense weight: .*from_linear"),
        ({"weight.quant_state.bitsandbytes__fp4": torch.zeros(1, dtype=torch.uint8)}, "is in FP4"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    strict: bool, state: dict[str, torch.Tensor], message: str
) -> None:
    module = layer()
    before = module.nf4_weight().clone()
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, strict=strict)
    assert all(torch.equal(t, before.tensors()[name]) for name, t in module.nf4_weight().tensors().items())


@pytest.mark.parametrize("assign", [True, False])
def test_a_bias_of_another_shape_is_refused(assign: bool) -> None:
    state = layer().state_dict() | {"bias": torch.zeros(47)}
    with pytest.raises(RuntimeError, match=r"bias should have shape \(48,\), and has \(47,\)"):
        layer().load_state_dict(state, assign=assign)


def test_scales_are_buffers_and_the_weight_a_frozen_parameter() -> None:
    module = layer()
    assert set(dict(module.named_buffers())) == set(SCALES)
    assert set(dict(module.named_parameters())) == {"weight", "bias"}

"""The product with a packed weight and its gradients against float64, and the dtype that it is computed in."""

import logging

import pytest
import torch
from largest_tensor import LargestTensor
from tolerances import TOLERANCES

from minipeft.kernels import nf4_matmul
from minipeft.nf4 import NF4Weight
from minipeft_kernels import arithmetic
from minipeft_kernels.arithmetic import arithmetic_dtype
from minipeft_kernels.linear import reference
from minipeft_kernels.linear.op import linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Weight:
    """A random (n, k) weight, packed, and the dense float64 matrix that it stands for."""

    def __init__(self, n: int, k: int, blocksize: int = 64, double: bool = True) -> None:
        w = NF4Weight.quantize(torch.randn(n, k) / max(k, 1) ** 0.5, blocksize, double)
        self.packed, self.dense = w.packed(), w.dequantize(torch.float64)


def assert_equals_dense(x: torch.Tensor, w: Weight, bias: torch.Tensor | None) -> None:
    """y, dx and db against the float64 product."""
    y = nf4_matmul(x, w.packed, bias=bias)
    dy = torch.randn_like(y)
    inputs = [x] if bias is None else [x, bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y64 = linear_reference(exact[0], w.packed, *exact[1:])
    gradients = torch.autograd.grad(y, inputs, dy)
    expected = [y64, *torch.autograd.grad(y64, exact, dy.double())]
    for ours, right in zip([y, *gradients], expected, strict=True):
        assert ours.dtype == x.dtype and ours.shape == right.shape
        torch.testing.assert_close(ours.double(), right, **TOLERANCES[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"), [(48, 128, 64), (63, 100, 64), (5, 1023, 32), (1, 1, 64), (7, 9, 4096)]
)
def test_product_and_gradients_equal_float64(n: int, k: int, blocksize: int, double: bool, dtype: torch.dtype) -> None:
    x = torch.randn(6, k).to(dtype).requires_grad_()
    bias = torch.randn(n).to(dtype).requires_grad_()
    w = Weight(n, k, blocksize, double)
    assert_equals_dense(x, w, bias)
    assert_equals_dense(x, w, None)


@pytest.mark.parametrize("shape", [(100,), (1, 100), (3, 100), (2, 3, 100), (0, 100), (2, 0, 100)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    w = Weight(63, 100)
    assert_equals_dense(torch.randn(shape).requires_grad_(), w, torch.randn(63).requires_grad_())


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0)])
def test_a_weight_of_no_elements(n: int, k: int) -> None:
    assert_equals_dense(torch.randn(3, k).requires_grad_(), Weight(n, k), torch.randn(n).requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 100, 33])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_rows_decoded_a_few_at_a_time_need_not_end_with_a_block(
    monkeypatch: pytest.MonkeyPatch, rows: int, k: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(reference, "CHUNK", rows * k)
    assert_equals_dense(torch.randn(4, k).to(dtype).requires_grad_(), Weight(50, k), None)


def test_a_strided_input_and_an_expanded_gradient() -> None:
    w = Weight(48, 128)
    x = torch.randn(128, 6).t().requires_grad_()
    assert_equals_dense(x, w, None)
    (dx,) = torch.autograd.grad(nf4_matmul(x, w.packed).sum(), x)  # its gradient is one number, expanded
    torch.testing.assert_close(dx.double(), w.dense.sum(0).expand(6, 128), **TOLERANCES[torch.float32])


def test_a_bias_of_another_dtype_gets_a_gradient_in_its_own() -> None:
    w = Weight(48, 128)
    bias = torch.randn(48, requires_grad=True)
    y = nf4_matmul(torch.randn(4, 128).bfloat16(), w.packed, bias=bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert bias.grad is not None and bias.grad.dtype == torch.float32 and (bias.grad == 4).all()


def test_only_the_packed_weight_is_kept_for_backward() -> None:
    w = Weight(64, 128)
    kept: list[torch.Tensor] = []
    x, bias = torch.randn(1000, 128, requires_grad=True), torch.randn(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = nf4_matmul(x, w.packed, bias=bias)
    tensors = [t for t in w.packed if isinstance(t, torch.Tensor)]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in tensors]
    assert not any(t.is_floating_point() and t.numel() > 256 for t in kept)
    y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_never_exists_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(reference, "CHUNK", 1 << 14)
    w = Weight(256, 1024)
    # The reference itself: within an operation a mode sees nothing.
    with LargestTensor() as largest:
        y = reference.multiply_reference(torch.randn(2, 1024).to(dtype), w.packed)
        reference.multiply_back_reference(y, w.packed)
    assert largest.nbytes <= 4 * ((1 << 14) + 2 * 64)


def test_nothing_is_kept_when_x_needs_no_gradient() -> None:
    w = Weight(64, 128)
    kept: list[torch.Tensor] = []
    bias = torch.randn(64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4_matmul(torch.randn(4, 128), w.packed, bias=bias).sum().backward()
    assert kept == []
    assert torch.equal(bias.grad, torch.full((64,), 4.0))


def test_second_derivatives_equal_those_of_the_formula_in_float64() -> None:
    """Of a penalty on the gradient, which is differentiated."""
    w, values = Weight(64, 128), torch.randn(2, 3, 128)
    found = []
    for dtype, product in (
        (torch.float32, lambda x: nf4_matmul(x, w.packed)),
        (torch.float64, lambda x: x @ w.dense.T),
    ):
        x = values.to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(product(x).tanh().sum(), x, create_graph=True)
        found += torch.autograd.grad(dx.pow(2).sum(), x)
    torch.testing.assert_close(found[0].double(), found[1], **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_another_input_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"got {dtype}"):
        nf4_matmul(torch.ones(4, 128, dtype=dtype), Weight(64, 128).packed)


def test_an_input_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last dimension \(64\) must be in_features \(128\)"):
        nf4_matmul(torch.ones(4, 64), Weight(64, 128).packed)


def test_what_the_cpu_multiplies_is_multiplied_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "CPU_DTYPES", frozenset({torch.float32, torch.bfloat16}))
    w = Weight(48, 128)
    x, dense = torch.randn(4, 128).bfloat16(), w.dense.bfloat16()
    assert torch.equal(nf4_matmul(x, w.packed), x @ dense.t())
    # Asked for bfloat16 with a float32 input: rounded on the way in, float32 on the way out.
    wide = nf4_matmul(x.float(), w.packed, compute_dtype=torch.bfloat16)
    assert torch.equal(wide, (x @ dense.t()).float())


@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16])
def test_what_the_cpu_would_emulate_is_float32_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: torch.dtype
) -> None:
    monkeypatch.setattr(arithmetic, "CPU_DTYPES", frozenset({torch.float32}))
    monkeypatch.setattr(arithmetic, "_said", set())
    w = Weight(48, 128)
    x = torch.randn(4, 128).to(asked).requires_grad_()
    exact = (x.float() @ w.dense.float().t()).to(asked)  # W is not rounded to `asked`
    with caplog.at_level(logging.WARNING, logger="minipeft"):
        y = nf4_matmul(x, w.packed)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        nf4_matmul(x.float(), w.packed, compute_dtype=asked)
    torch.testing.assert_close(y, exact, rtol=torch.finfo(asked).eps, atol=0)
    assert dx.dtype == asked
    assert [str(asked) in record.message for record in caplog.records] == [True]


def test_other_devices_multiply_in_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "CPU_DTYPES", frozenset({torch.float32}))
    assert arithmetic_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16

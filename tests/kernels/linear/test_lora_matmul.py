"""LoRA's products against float64, finite differences and plain products, in both backends."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor

from minipeft import LoraConfig, inject_adapter_in_model
from minipeft.kernels import lora_matmul, lora_update
from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft_kernels.linear.op import linear, linear_reference

# The interpreter computes in numpy, which warns where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MINIPEFT_BACKEND", request.param)
    return str(request.param)


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, lora_A, lora_B = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(6, 3)
    return tuple(t.to(dtype).requires_grad_() for t in (x, lora_A, lora_B))  # type: ignore[return-value]


def test_gradients_agree_with_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *t: lora_update(*t, 0.7), factors(torch.float64))


def test_dtype_is_the_wider_one_and_autocasts_under_autocast() -> None:
    x, lora_A, lora_B = factors(torch.float32)
    narrow = x.detach().bfloat16()
    assert lora_update(narrow, lora_A, lora_B, 1.0).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lora_update(x, lora_A, lora_B, 1.0)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert lora_A.grad is not None and lora_A.grad.dtype is torch.float32
    torch.testing.assert_close(out.float(), x @ lora_A.T @ lora_B.T, rtol=0.02, atol=0.1)


def test_only_the_gradients_that_are_needed_are_made() -> None:
    x, lora_A, lora_B = factors(torch.float64)
    out = lora_update(x.detach(), lora_A, lora_B.detach(), 2.0)
    out.sum().backward()
    assert lora_A.grad is not None and x.grad is None and lora_B.grad is None


class Layer:
    """An NF4 weight with an adapter of rank r and a bias, and the same in float64."""

    def __init__(self, n: int, k: int, r: int, blocksize: int = 64, double: bool = True) -> None:
        w = NF4Weight.quantize(torch.randn(n, k) / max(k, 1) ** 0.5, blocksize, double)
        self.packed = w.packed()
        self.dense = w.dequantize(torch.float64)
        self.lora_A = (torch.randn(r, k) / max(k, 1) ** 0.5).requires_grad_()
        self.lora_B = (torch.randn(n, r) / r**0.5).requires_grad_()
        self.bias = torch.randn(n).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        return lora_matmul(x, self.packed, self.lora_A, self.lora_B, 0.5, self.bias)

    def assert_equals_float64(self, x: Tensor) -> None:
        """y and every gradient."""
        inputs = [x, self.lora_A, self.lora_B, self.bias]
        y = self(x)
        dy = torch.randn_like(y)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        x64, lora_A, lora_B, bias = exact
        y64 = linear_reference(x64, self.packed, bias, (lora_A, lora_B, 0.5))
        ours, right = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(y64, exact, dy.double())
        assert y.dtype == x.dtype
        for a, b, t in zip((y, *ours), (y64, *right), (y, *inputs), strict=True):
            assert a.shape == b.shape == t.shape and a.dtype == t.dtype
            # Sums over rows grow with their number.
            torch.testing.assert_close(a.double(), b, **scaled(TOLERANCES[x.dtype], b))


def scaled(tolerance: dict[str, Any], right: Tensor) -> dict[str, Any]:
    size = max(1.0, float(right.detach().abs().max())) if right.numel() else 1.0
    return {"rtol": tolerance["rtol"], "atol": tolerance["atol"] * size}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "r", "blocksize"), [(48, 128, 4, 64), (63, 256, 3, 128), (5, 100, 1, 64), (130, 64, 20, 64)]
)
def test_product_and_gradients_equal_float64(
    n: int, k: int, r: int, blocksize: int, double: bool, dtype: torch.dtype
) -> None:
    Layer(n, k, r, blocksize, double).assert_equals_float64(torch.randn(6, k).to(dtype).requires_grad_())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (0, 128), (2, 0, 128), (20, 128), (70, 128)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    Layer(33, 128, 4).assert_equals_float64(torch.randn(shape).requires_grad_())


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(BACKENDS),
    st.integers(1, 90),
    st.integers(1, 200),
    st.integers(1, 24),
    st.integers(0, 24),
    st.sampled_from(DTYPES),
)
def test_any_sizes(backend: str, n: int, k: int, r: int, m: int, dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPEFT_BACKEND", backend)
        Layer(n, k, r).assert_equals_float64(torch.randn(m, k).to(dtype).requires_grad_())


@pytest.mark.usefixtures("backend")
def test_strided_input_and_expanded_gradient() -> None:
    layer = Layer(48, 128, 4)
    x = torch.randn(128, 6).t().requires_grad_()
    layer.assert_equals_float64(x)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)  # its gradient is one number, expanded
    right = (layer.dense + 0.5 * layer.lora_B.double() @ layer.lora_A.double()).sum(0)
    torch.testing.assert_close(dx.double(), right.expand(6, 128), rtol=1e-5, atol=1e-4)


def kept_by(layer: Layer, x: Tensor) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    return kept


def test_only_x_and_its_image_under_A_are_kept_beside_the_weights() -> None:
    layer, x = Layer(64, 128, 4), torch.randn(1000, 128).bfloat16().requires_grad_()
    weights = [t for t in (*layer.packed.tensors(), layer.lora_A, layer.lora_B) if t is not None]
    own = [t for t in kept_by(layer, x) if not any(t.data_ptr() == w.data_ptr() for w in weights)]
    assert [(t.data_ptr() == x.data_ptr(), tuple(t.shape)) for t in own] == [(True, (1000, 128)), (False, (1000, 4))]


def test_x_is_not_kept_when_A_is_frozen() -> None:
    layer, x = Layer(64, 128, 4), torch.randn(1000, 128).requires_grad_()
    layer.lora_A.requires_grad_(False)
    assert not any(t.data_ptr() == x.data_ptr() for t in kept_by(layer, x))
    assert x.grad is not None and layer.lora_B.grad is not None and layer.lora_A.grad is None


@pytest.mark.usefixtures("backend")
def test_the_adapter_alone_may_need_gradients() -> None:
    layer, x = Layer(64, 128, 4), torch.randn(5, 128)
    layer.bias.requires_grad_(False)
    layer(x).sum().backward()
    right = 0.5 * layer.lora_B.sum(0)[:, None] * x.sum(0)
    torch.testing.assert_close(layer.lora_A.grad, right.detach(), rtol=1e-4, atol=1e-4)


def test_what_it_cannot_take_is_refused() -> None:
    layer = Layer(64, 128, 4)
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        layer(torch.ones(2, 128, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"last dimension \(64\) must be in_features \(128\)"):
        layer(torch.ones(2, 64))


def test_second_derivatives_agree_with_finite_differences() -> None:
    assert torch.autograd.gradgradcheck(lambda *t: lora_update(*t, 0.7), factors(torch.float64))


@pytest.mark.parametrize("packed", [False, True])
def test_second_derivatives_equal_those_of_the_formula_in_float64(packed: bool) -> None:
    """Of a penalty on the gradients of x, A, B and the bias, over a dense and a packed W."""
    w = NF4Weight.quantize(torch.randn(64, 128) / 11)
    tensors = [torch.randn(2, 3, 128), torch.randn(4, 128) / 11, torch.randn(64, 4), torch.randn(64)]

    def second(dtype: torch.dtype, product: Any, weight: Any) -> tuple[Tensor, ...]:
        x, lora_A, lora_B, bias = all_of_them = [t.to(dtype).requires_grad_() for t in tensors]
        y = product(x, weight, bias, (lora_A, lora_B, 0.7))
        first = torch.autograd.grad(y.tanh().sum(), all_of_them, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), all_of_them)

    ours = second(torch.float32, linear, w.packed() if packed else w.dequantize(torch.float32))
    right = second(torch.float64, linear_reference, w.packed() if packed else w.dequantize(torch.float64))
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_a_second_derivative_that_cannot_be_had_is_refused() -> None:
    """A is frozen, so that x is not kept, on which the gradient of B depends."""
    x, lora_A, lora_B = factors(torch.float64)
    first = torch.autograd.grad
    with pytest.raises(RuntimeError, match="whose A is frozen"):
        first(lora_update(x, lora_A.detach(), lora_B, 0.7).tanh().sum(), (x, lora_B), create_graph=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_layer_fuses_its_adapter_unless_dropout_acts(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    calls: list[int] = []
    monkeypatch.setattr("minipeft.lora.layer.linear", lambda *args: calls.append(1) or linear(*args))
    model = torch.nn.Sequential()
    model.add_module("q_proj", NF4Linear.from_linear(torch.nn.Linear(64, 32)))
    model = inject_adapter_in_model(
        LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=dropout, init_lora_weights=False), model
    )
    x = torch.randn(5, 64)
    layer = model.q_proj
    apart = torch.nn.functional.linear(x, layer.dequantize(), layer.bias) + lora_update(
        x, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    )
    model.eval()
    torch.testing.assert_close(model(x), apart, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    model.train()
    different = not torch.allclose(model(x), apart, rtol=1e-4, atol=1e-4)
    assert different == (dropout > 0) and len(calls) == (1 if dropout else 2)

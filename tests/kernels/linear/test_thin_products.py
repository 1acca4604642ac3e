"""LoRA's small products by the kernel that takes x as it is: to float32's precision, for any shapes and strides."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minipeft.kernels import lora_linear
from minipeft_kernels.linear import thin_triton
from minipeft_kernels.linear.thin import MAX_RANK, as_thin_takes, grad_of_A, grad_of_B, project, project_back

HALVES = [torch.bfloat16, torch.float16]
# A float32 sum's error, relative to the sum of the terms' sizes. One bfloat16 part of the factor would be off by 2e-3.
FLOAT32 = 1e-6


def exact(a: Tensor, b: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """s a b in float64, and the same sum of the terms' sizes, to which an error is compared."""
    a, b = a.double(), b.double()
    return scaling * (a @ b), abs(scaling) * (a.abs() @ b.abs())


def assert_close(ours: Tensor, right: tuple[Tensor, Tensor], relative: float) -> None:
    value, sizes = right
    assert ours.shape == value.shape
    assert ((ours.double() - value).abs() <= relative * sizes + 1e-37).all(), (ours.double() - value).abs().max()


def all_four(x: Tensor, lora_A: Tensor, lora_B: Tensor, g: Tensor, dtype: torch.dtype, relative: float) -> None:
    """low, g, dA and dB of one x, which is dy as well."""
    assert_close(project(x, lora_A, -1.5, dtype), exact(x, lora_A.T, -1.5), relative)
    assert_close(project_back(x, lora_B, 0.3, dtype), exact(x, lora_B, 0.3), relative)
    dA, dB = grad_of_A(g, x, torch.float32), grad_of_B(x, g, torch.float32)
    assert dA.is_contiguous() and dB.is_contiguous()
    assert_close(dA, exact(g.T, x), relative)
    assert_close(dB, exact(x.T, g), relative)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches of the kernel, as they are made."""
    made: list[Any] = []
    launch = thin_triton.Prepared.__call__
    monkeypatch.setattr(thin_triton.Prepared, "__call__", lambda self, *a: made.append(self) or launch(self, *a))
    return made


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("m", "k", "rank"), [(1, 100, 16), (17, 320, 5), (70, 65, 33), (130, 64, 4), (3, 40, 130)])
def test_products_have_the_precision_of_float32(m: int, k: int, rank: int, launches: list[Any]) -> None:
    """Wide ranges of sizes in the factor, of which all 24 bits count."""
    size = torch.exp2(torch.randint(-20, 20, (m, 1)).float())
    a, b = torch.randn(rank, k) * torch.exp2(torch.randint(-9, 9, (1, k)).float()), torch.randn(k, rank)
    all_four(torch.randn(m, k).bfloat16(), a, b, torch.randn(m, rank) * size, torch.float32, FLOAT32)
    assert len(launches) == 4


@pytest.mark.usefixtures("kernels")
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_and_strides(data: st.DataObject) -> None:
    m, k, rank = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 150)), data.draw(st.integers(1, 70))

    def matrix(rows: int, columns: int) -> Tensor:
        """Transposed, or cut from a larger one, or every other column of it, or a row again and again."""
        kind = data.draw(st.sampled_from(["plain", "transposed", "cut", "every other", "expanded"]))
        if kind == "transposed":
            return torch.randn(columns, rows).T
        if kind == "cut":
            return torch.randn(rows + 1, columns + 3)[1:, 2 : columns + 2]
        if kind == "every other":
            return torch.randn(rows, 2 * columns)[:, ::2]
        return torch.randn(1, columns).expand(rows, columns) if kind == "expanded" else torch.randn(rows, columns)

    x = matrix(m, k).bfloat16() if data.draw(st.booleans()) else torch.randn(k, m).bfloat16().T
    all_four(x, matrix(rank, k), matrix(k, rank), matrix(m, rank), torch.float32, FLOAT32)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", HALVES)
def test_a_factor_that_is_rounded_is_one_part(dtype: torch.dtype, launches: list[Any]) -> None:
    """As under autocast: float32 A and B, and everything in 16 bits, each number rounded once."""
    x, a, b = torch.randn(40, 96).to(dtype), torch.randn(8, 96), torch.randn(96, 8)
    low, g = project(x, a, 0.7, dtype), project_back(x, b, 0.7, dtype)
    assert low.dtype == g.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 + FLOAT32
    assert_close(low, exact(x, a.T.to(dtype), 0.7), rounding)
    assert_close(g, exact(x, b.to(dtype), 0.7), rounding)
    dA, dB = grad_of_A(g, x, torch.float32), grad_of_B(x, low, torch.float32)
    assert dA.dtype == dB.dtype == torch.float32
    assert_close(dA, exact(g.T, x), FLOAT32)
    assert_close(dB, exact(x.T, low), FLOAT32)
    assert [launch.constants["PARTS"] for launch in launches] == [1] * 4


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("processors", [1, 3, 200])
@pytest.mark.parametrize("m", [5, 200])
def test_shared_tiles_add_up_to_the_same_bits_every_time(
    m: int, processors: int, monkeypatch: pytest.MonkeyPatch, launches: list[Any]
) -> None:
    monkeypatch.setattr(thin_triton, "multiprocessors", lambda device: processors)
    x, a, b, g = torch.randn(m, 1100).bfloat16(), torch.randn(16, 1100), torch.randn(1100, 16), torch.randn(m, 16)
    all_four(x, a, b, g, torch.float32, FLOAT32)
    assert torch.equal(project(x, a, 2.0, torch.float32), project(x, a, 2.0, torch.float32))
    assert processors == 1 or max(launch.grid[1] for launch in launches) > 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of infinity minus infinity
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """A gradient scaler and a check for NaN must still see it; and the other rows must not."""
    x, a, g = torch.randn(20, 64).bfloat16(), torch.randn(4, 64), torch.randn(20, 4)
    a[1, 5] = g[3, 1] = bad
    low, dA = project(x, a, 1.0, torch.float32), grad_of_A(g, x, torch.float32)
    assert not low[:, 1].isfinite().any() and low[:, [0, 2, 3]].isfinite().all()
    assert not dA[1].isfinite().any() and dA[[0, 2, 3]].isfinite().all()


def test_factors_of_any_finite_size_are_cut_into_parts_without_loss() -> None:
    """Ones in x: the sum is the number itself, largest and smallest, to its last bit."""
    numbers = [3.4028235e38, -3.4028235e38, 1.1754944e-38 * 2**20, 1 + 2**-23, -(2 - 2**-23), 0.0, 1 / 3]
    a = torch.tensor(numbers)[:, None] * torch.ones(1)
    out = torch.empty(1, len(numbers))
    thin_triton.product(torch.ones(1, 1).bfloat16(), a.T, torch.float32, out)
    assert torch.equal(out[0], torch.tensor(numbers))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "m", "rank"),
    [
        (torch.float16, torch.float32, 4, 4),  # no 16-bit parts to cut a factor into
        (torch.float32, torch.float32, 4, 4),
        (torch.bfloat16, torch.float64, 4, 4),
        (torch.bfloat16, torch.float32, 4, MAX_RANK + 1),
        (torch.bfloat16, torch.float32, 0, 4),
        (torch.bfloat16, torch.float32, 4, 0),
    ],
)
def test_what_the_kernel_does_not_take_torch_multiplies(
    x_dtype: torch.dtype, dtype: torch.dtype, m: int, rank: int, launches: list[Any]
) -> None:
    x, a = torch.randn(m, 24).to(x_dtype), torch.randn(rank, 24)
    low = project(x, a, 2.0, dtype)
    assert low.dtype == dtype and not launches
    assert_close(low, exact(x, a.T, 2.0), FLOAT32)
    dB = grad_of_B(as_thin_takes(x, rank, dtype), low, torch.float32)
    assert_close(dB, exact(x.T, low), FLOAT32)


@pytest.mark.usefixtures("kernels")
def test_a_layer_casts_no_activations(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 model with float32 adapters: one launch for each small product, and gradients as in float64."""
    x = torch.randn(3, 7, 48).bfloat16().requires_grad_()
    w, a, b = torch.randn(32, 48).bfloat16(), torch.randn(4, 48), torch.randn(32, 4)
    lora_A, lora_B = a.clone().requires_grad_(), b.clone().requires_grad_()
    cast, widened = Tensor.to, []

    def to(t: Tensor, *args: Any, **options: Any) -> Tensor:
        if t.dtype == torch.bfloat16 and torch.float32 in args:
            widened.append(t.shape)
        return cast(t, *args, **options)

    monkeypatch.setattr(Tensor, "to", to)
    # As on a GPU: a CPU without bfloat16 instructions takes the base's own product in float32.
    monkeypatch.setattr("minipeft_kernels.linear.dense.arithmetic_dtype", lambda dtype, device: dtype)
    y = lora_linear(x, w, None, lora_A, lora_B, 0.5)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert len(launches) == 4 and not widened
    rows, dys = x.detach().double().reshape(-1, 48), dy.double().reshape(-1, 32)
    low, g = 0.5 * rows @ a.double().T, 0.5 * dys @ b.double()
    assert lora_A.grad is not None and lora_B.grad is not None
    assert_close(lora_A.grad, exact(g.T, rows), 3 * FLOAT32)
    assert_close(lora_B.grad, exact(dys.T, low), 3 * FLOAT32)

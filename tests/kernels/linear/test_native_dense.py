"""Products with dense weights in compiled code, of few rows and in 16 bits, against float64; what is left to torch."""

import pytest
import torch
from guarded import Guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from native_weights import LEVELS, become, count_calls, needs_library
from torch import Tensor

from minipeft_kernels import arithmetic, native
from minipeft_kernels.linear import dense_cpu
from minipeft_kernels.linear.op import linear, linear_reference

# Of the terms' magnitudes: float32's rounding of some sums, and a result rounded to bfloat16.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
# Levels that have products, but no bfloat16 instructions.
EMULATING = [level for level in LEVELS if level not in (native.SCALAR, native.AVX512_BF16)]
pytestmark = [needs_library, pytest.mark.usefixtures("compiled")]


def error(y: Tensor, x: Tensor, w: Tensor, lora: tuple[Tensor, Tensor, float] | None = None) -> float:
    """The largest distance from the float64 result, in units of the largest sum of the terms' magnitudes."""
    x, w = x.double(), w.double()
    size = x.abs() @ w.abs().T
    if lora is not None:
        a, b, scaling = lora[0].double(), lora[1].double(), lora[2]
        size += abs(scaling) * (x.abs() @ a.abs().T) @ b.abs().T
        lora = a, b, scaling
    return float((y.double() - linear_reference(x, w, None, lora)).abs().max() / size.max())


@given(
    m=st.integers(1, 4),
    n=st.integers(1, 150),
    blocks=st.sampled_from([1, 2, 3, 5, 40, 65]),
    rank=st.sampled_from([None, 0, 1, 7, 16, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    to=st.sampled_from([torch.float32, torch.bfloat16]),
    which=st.sampled_from(LEVELS),
)
@settings(max_examples=100, deadline=None)
def test_few_rows_equal_float64(
    m: int, n: int, blocks: int, rank: int | None, dtype: torch.dtype, to: torch.dtype, which: int
) -> None:
    k = 32 * blocks
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    lora = None if rank is None else (torch.randn(rank, k), torch.randn(n, rank), -0.7)
    with pytest.MonkeyPatch.context() as patch:
        become(which, patch)
        patch.setattr(dense_cpu, "LEAST", 0)
        y = dense_cpu.thin_product(x, w, to, lora)
    assert (y is None) == (which == native.SCALAR)
    if y is not None:
        assert y.dtype == to and y.shape == (m, n)
        assert error(y, x, w, lora) < TOLERANCES[to]


@pytest.mark.skipif(not EMULATING, reason="no level that has products without bfloat16 instructions")
@given(
    m=st.sampled_from([1, 2, 5, 6, 7, 16, 300]),
    n=st.integers(1, 150),
    blocks=st.integers(1, 9),
    which=st.sampled_from(EMULATING or [native.SCALAR]),
)
@settings(max_examples=60, deadline=None)
def test_16_bits_without_instructions_equal_float64(m: int, n: int, blocks: int, which: int) -> None:
    x, dy, w = (torch.randn(*shape).bfloat16() for shape in ((m, 32 * blocks), (m, n), (n, 32 * blocks)))
    with pytest.MonkeyPatch.context() as patch:
        become(which, patch)
        patch.setattr(dense_cpu, "LEAST", 0)
        y, dx = dense_cpu.product(x, w, backward=False), dense_cpu.product(dy, w, backward=True)
    assert y is not None and dx is not None and y.dtype == dx.dtype == torch.float32
    assert error(y, x, w) < TOLERANCES[torch.float32]
    assert error(dx, dy, w.T) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operation_takes_them_with_a_gradient_and_without(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, level: int
) -> None:
    w, bias = torch.randn(320, 160).to(dtype), torch.randn(320).to(dtype)
    lora = torch.randn(8, 160, requires_grad=True), torch.randn(320, 8, requires_grad=True), 0.5
    calls = count_calls(monkeypatch)
    emulated = dtype not in arithmetic.CPU_DTYPES
    for rows in (2, 7):
        x, dy = torch.randn(rows, 160).to(dtype), torch.randn(rows, 320).to(dtype)
        with torch.no_grad():
            y = linear(x, w, bias, lora)
        thin, panels = int(rows == 2), int(rows == 7)
        expected = (thin or panels * emulated) * (level != native.SCALAR)
        assert calls == ["minipeft_dense"] * expected
        x.requires_grad_()
        calls.clear()
        out = linear(x, w, bias, lora)
        gradients = torch.autograd.grad(out, (x, *lora[:2]), dy)
        assert calls == ["minipeft_dense"] * ((expected + emulated) * (level != native.SCALAR))
        calls.clear()
        exact = [t.detach().double().requires_grad_() for t in (x, *lora[:2])]
        right = linear_reference(exact[0], w.double(), bias.double(), (exact[1], exact[2], 0.5))
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
        pairs = zip((y, out, *gradients), (right, right, *torch.autograd.grad(right, exact, dy.double())), strict=True)
        for got, wanted in pairs:
            assert (got.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n"), [(3, 1), (1, 63), (4, 66)])
def test_nothing_is_written_beside_the_result(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, n: int, level: int
) -> None:
    if level == native.SCALAR:
        pytest.skip("the compiled products want AVX2 or NEON")
    monkeypatch.setattr(dense_cpu, "LEAST", 0)
    x, w = torch.randn(rows, 96).to(dtype), torch.randn(n, 96).to(dtype)
    lora = torch.randn(5, 96), torch.randn(n, 5), 1.0
    buffer = Guarded(rows * n, dtype=dtype)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: buffer.out.view(shape))
    y = dense_cpu.thin_product(x, w, dtype, lora)
    monkeypatch.undo()
    assert y is not None and y.data_ptr() == buffer.out.data_ptr()
    assert error(buffer.check().view(rows, n), x, w, lora) < TOLERANCES[dtype]


def test_what_does_not_fit_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    calls = count_calls(monkeypatch)
    x = torch.randn(2, 320)
    for w in (torch.randn(160, 320)[:, :300].contiguous(), torch.randn(320, 160).T, torch.randn(16, 320).double()):
        other = x[:, : w.shape[1]].to(w.dtype)
        with torch.no_grad():
            torch.testing.assert_close(linear(other, w), other @ w.T)
    trained = torch.randn(160, 320, requires_grad=True)
    assert linear(x, trained).requires_grad
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        linear(torch.randn(2, 160), torch.randn(160, 320))
    assert not calls

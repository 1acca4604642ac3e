"""The quantization kernels, in the interpreter, equal the reference bit by bit."""

import pytest
import torch
from guarded import Guarded, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minipeft_kernels.nf4.checks import BLOCKSIZES
from minipeft_kernels.nf4.codebooks import NF4_BOUNDARIES, dynamic_map, exact_thresholds
from minipeft_kernels.nf4.quantize import (
    nf4_quantize,
    nf4_quantize_reference,
    quantize_absmax,
    quantize_absmax_reference,
)
from minipeft_kernels.nf4.quantize_triton import quantize_absmax_into, quantize_into

# The interpreter computes in numpy, which warns where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


def assert_equals_reference(w: Tensor, blocksize: int) -> None:
    n = w.numel()
    codes, absmax = Guarded((n + 1) // 2, 1, dtype=torch.uint8), Guarded(-(-n // blocksize), dtype=torch.float32)
    quantize_into(w, codes.out, absmax.out, blocksize)
    expected_codes, expected_absmax = nf4_quantize_reference(w, blocksize)
    assert torch.equal(codes.check(), expected_codes)
    assert torch.equal(absmax.check(), expected_absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_and_dtype(blocksize: int, dtype: torch.dtype) -> None:
    for n in (0, 1, blocksize - 1, blocksize, blocksize + 1, 2 * blocksize + 7, 4096 + 33):
        assert_equals_reference(torch.randn(n).to(dtype), blocksize)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.sampled_from([32, 64, 128, 1024]), st.sampled_from(DTYPES), st.integers(0, 1 << 30))
def test_any_size(n: int, blocksize: int, dtype: torch.dtype, seed: int) -> None:
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_equals_reference(w, blocksize)


@settings(max_examples=40, deadline=None)
@given(st.lists(floats, min_size=1, max_size=100))
def test_any_floats(values: list[float]) -> None:
    assert_equals_reference(torch.tensor(values, dtype=torch.float32), 32)


@pytest.mark.parametrize("scale", [1.0, 4.0, 2.0**-100, 2.0**100])
def test_ties_and_their_neighbours(scale: float) -> None:
    blocks = torch.zeros(15, 64)
    blocks[:, 0] = 1
    blocks[:, 1] = NF4_BOUNDARIES.nextafter(torch.tensor(-torch.inf))
    blocks[:, 2] = NF4_BOUNDARIES
    blocks[:, 3] = NF4_BOUNDARIES.nextafter(torch.tensor(torch.inf))
    assert_equals_reference(blocks * scale, 64)
    assert_equals_reference((blocks * scale).view(-1)[: 14 * 64 + 5], 64)  # the short block divides


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 9e-39, 1.2e-38])
def test_subnormal_and_zero_blocks(scale: float) -> None:
    assert_equals_reference(torch.linspace(-1, 1, 64 + 31) * scale, 64)


@pytest.mark.usefixtures("kernels")
def test_a_strided_weight_is_read_in_its_own_order() -> None:
    w = torch.randn(48, 80)
    for view in (w.t(), w[:, ::3], w[5:, 7:], strided(w)):
        expected = nf4_quantize_reference(view.contiguous(), 64)
        assert all(torch.equal(a, b) for a, b in zip(nf4_quantize(view, 64), expected, strict=True))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("index", [(0, 0), (70, 5), (99, 12)])
def test_a_weight_that_is_not_finite_is_refused_by_its_place(index: tuple[int, int], value: float) -> None:
    w = torch.randn(100, 13)
    w[index] = value
    with pytest.raises(ValueError, match=rf"index \({index[0]}, {index[1]}\) is {value}"):
        nf4_quantize(w)


def assert_scales_equal_reference(absmax: Tensor) -> None:
    codes = Guarded(absmax.numel(), dtype=torch.uint8)
    nested = Guarded(-(-absmax.numel() // 256), dtype=torch.float32)
    offset = absmax.mean()
    quantize_absmax_into(absmax, offset, codes.out, nested.out)
    expected_codes, expected_nested = quantize_absmax_reference(absmax, offset)
    assert torch.equal(codes.check(), expected_codes)
    assert torch.equal(nested.check(), expected_nested)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2500), st.floats(-38, 30), st.integers(0, 1 << 30))
def test_any_scales(blocks: int, exponent: float, seed: int) -> None:
    assert_scales_equal_reference(torch.rand(blocks, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent)


def test_equal_scales_and_single_ones() -> None:
    assert_scales_equal_reference(torch.full((300,), 0.25))
    assert_scales_equal_reference(torch.tensor([3.0]))


@pytest.mark.usefixtures("kernels")
def test_the_operation_on_scales_equals_the_reference() -> None:
    absmax = torch.rand(700)
    codes, nested, offset = quantize_absmax(absmax)
    expected = quantize_absmax_reference(absmax, absmax.mean())
    assert torch.equal(codes, expected[0]) and torch.equal(nested, expected[1]) and offset == absmax.mean()
    assert all(t.numel() == size for t, size in zip(quantize_absmax(torch.empty(0)), (0, 0, 1), strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_thresholds_divide_as_exact_midpoints_do(signed: bool) -> None:
    entries = dynamic_map(signed)
    exact = (entries[1:].double() + entries[:-1].double()) / 2
    rounded = exact_thresholds(entries)
    # The float32 numbers on either side of each midpoint fall on the same side of its threshold.
    assert (rounded.double() <= exact).all()
    assert (rounded.nextafter(torch.tensor(torch.inf)).double() > exact).all()

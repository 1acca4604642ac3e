"""Quantization against a slow oracle in numpy, and its refusals."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from numpy.typing import NDArray

from minipeft_kernels.nf4.checks import BLOCKSIZES
from minipeft_kernels.nf4.codebooks import NF4_BOUNDARIES, NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.quantize import nf4_quantize, nf4_quantize_reference, quantize_absmax

module = importlib.import_module("minipeft_kernels.nf4.quantize")
TINY = np.float32(1e-38)


def oracle(w: torch.Tensor, blocksize: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """One weight at a time in numpy float32, boundaries compared in float64."""
    values = w.float().reshape(-1).numpy()
    codes: list[int] = []
    scales: list[np.float32] = []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        scale = np.float32(np.abs(block).max())
        if len(block) == blocksize:
            scaled = block * (np.float32(1) / max(scale, TINY))
        else:
            scale = max(scale, TINY)
            scaled = block / scale
        scales.append(scale)
        codes += [int(sum(float(v) > float(b) for b in NF4_BOUNDARIES)) for v in scaled]
    if len(codes) % 2:
        codes.append(7)
    pairs = np.array(codes, dtype=np.uint8).reshape(-1, 2)
    return pairs[:, 0] * np.uint8(16) + pairs[:, 1], np.array(scales, dtype=np.float32)


def assert_is_oracle(w: torch.Tensor, blocksize: int) -> None:
    codes, absmax = nf4_quantize(w, blocksize)
    expected_codes, expected_absmax = oracle(w, blocksize)
    assert codes.shape == ((w.numel() + 1) // 2, 1)
    assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32
    np.testing.assert_array_equal(codes.view(-1).numpy(), expected_codes)
    np.testing.assert_array_equal(absmax.numpy(), expected_absmax)


def around(numbers: torch.Tensor) -> torch.Tensor:
    """Each number with its neighbours in float32."""
    infinity = torch.tensor(torch.inf)
    return torch.stack([torch.nextafter(numbers, -infinity), numbers, torch.nextafter(numbers, infinity)]).view(-1)


@pytest.mark.parametrize("scale", [1.0, 4.0, 2.0**-100, 2.0**100])
def test_a_tie_takes_the_lower_code(scale: float) -> None:
    blocks = torch.zeros(15, 64)
    blocks[:, 0] = 1
    blocks[:, 1:4] = around(NF4_BOUNDARIES).view(3, 15).t()
    codes, _ = nf4_quantize(blocks * scale, 64)
    high, low = codes.view(15, 32)[:, 0] >> 4, codes.view(15, 32)[:, 0] & 15
    assert (high == 15).all()
    assert low.tolist() == list(range(15))  # just below boundary i
    tie, above = codes.view(15, 32)[:, 1] >> 4, codes.view(15, 32)[:, 1] & 15
    assert tie.tolist() == list(range(15))
    assert above.tolist() == list(range(1, 16))


def test_codes_equal_a_search_over_every_upper_half_of_a_float() -> None:
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.cat([upper, upper | 0xFFFF, upper | 0x8000]).view(torch.float32)
    numbers = torch.cat([ends[ends.abs() <= 1], around(NF4_BOUNDARIES), around(NF4_LEVELS).clamp(-1, 1)])
    assert torch.equal(module._nearest_codes(numbers).int(), torch.bucketize(numbers, NF4_BOUNDARIES).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (1, 63), (65,), (3, 43), (5, 13), (2, 4, 16), (33, 100)])
def test_shapes_and_dtypes_equal_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_is_oracle(torch.randn(shape).to(dtype), 64)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_equals_the_oracle(blocksize: int) -> None:
    assert_is_oracle(torch.randn(2, blocksize), blocksize)
    assert_is_oracle(torch.randn(blocksize + 7), blocksize)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True), min_size=1, max_size=100)
)
def test_any_floats_equal_the_oracle(values: list[float]) -> None:
    assert_is_oracle(torch.tensor(values, dtype=torch.float32), 32)


def test_a_zero_block_is_all_code_seven_and_a_zero_tail_stores_the_smallest_scale() -> None:
    codes, absmax = nf4_quantize(torch.zeros(65), 64)
    assert (codes == 0x77).all()
    assert absmax.tolist() == [0.0, float(TINY)]


def test_subnormals_are_code_seven() -> None:
    codes, absmax = nf4_quantize(torch.linspace(-3e-40, 3e-40, 64), 64)
    assert (codes == 0x77).all()
    assert absmax.item() == float(np.float32(3e-40))


def test_a_strided_weight_is_read_in_its_own_order() -> None:
    w = torch.randn(48, 80)
    for strided in (w.t(), w[:, ::3], w[5:, 7:]):
        expected = nf4_quantize(strided.contiguous(), 64)
        assert all(torch.equal(a, b) for a, b in zip(nf4_quantize(strided, 64), expected, strict=True))


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_the_chunk_does_not_matter(monkeypatch: pytest.MonkeyPatch, blocksize: int) -> None:
    w = torch.randn(3 * 4096 + 77)
    whole = nf4_quantize(w, blocksize)
    monkeypatch.setattr(module, "CHUNK", 4096)
    assert all(torch.equal(a, b) for a, b in zip(nf4_quantize(w, blocksize), whole, strict=True))


def test_temporaries_stay_within_a_chunk() -> None:
    w = torch.randn(1 << 20).bfloat16()
    nf4_quantize_reference(w, 64)  # builds the tables, once
    # The reference itself: within an operation a mode sees nothing.
    with LargestTensor() as largest:
        codes, _ = nf4_quantize_reference(w, 64)
    assert largest.nbytes <= max(codes.nbytes, 4 * module.CHUNK)


@pytest.mark.parametrize("blocksize", [0, 1, 16, 48, 63, 65, 8192, -64, 64.0, None])
def test_another_blocksize_is_refused_with_the_rule_and_the_value(blocksize: int) -> None:
    with pytest.raises(ValueError, match=rf"power of two from 32 to 4096, got {blocksize}"):
        nf4_quantize(torch.ones(64), blocksize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.uint8])
def test_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"got {dtype}"):
        nf4_quantize(torch.ones(64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("index", [(0, 0), (70, 5), (99, 12)])
def test_a_weight_that_is_not_finite_is_refused_by_its_place(
    index: tuple[int, int], value: float, dtype: torch.dtype
) -> None:
    w = torch.randn(100, 13).to(dtype)
    w[index] = value
    with pytest.raises(ValueError, match=rf"index \({index[0]}, {index[1]}\) is {value}"):
        nf4_quantize(w)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.floats(-30, 30), st.integers(0, 1 << 30))
def test_scale_codes_are_the_exact_nearest_entries(blocks: int, exponent: float, seed: int) -> None:
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    codes, nested, offset = quantize_absmax(absmax)
    assert torch.equal(offset, absmax.mean())
    for start in range(0, blocks, 256):
        centred = absmax[start : start + 256] - offset
        assert nested[start // 256] == centred.abs().max()
        if nested[start // 256] == 0:
            continue
        scaled = (centred * (1 / nested[start // 256])).double()
        distances = (scaled.unsqueeze(1) - dynamic_map().double()).abs()
        assert torch.equal(codes[start : start + 256].long(), distances.argmin(1))  # the first of equals


def test_the_last_bit_of_a_scaled_scale_is_that_of_a_product_with_the_reciprocal() -> None:
    absmax = torch.rand(1 << 20)
    codes, nested, offset = quantize_absmax(absmax)
    centred = (absmax - offset).view(-1, 256)
    entries = dynamic_map().double()
    midpoints = (entries[1:] + entries[:-1]) / 2
    product = torch.bucketize((centred * (1 / nested.unsqueeze(1))).double(), midpoints)
    quotient = torch.bucketize((centred / nested.unsqueeze(1)).double(), midpoints)
    assert not torch.equal(product, quotient)  # the cases tell the two apart
    assert torch.equal(codes, product.view(-1).to(torch.uint8))


def test_scales_that_are_all_equal_have_nested_scale_zero() -> None:
    codes, nested, offset = quantize_absmax(torch.full((300,), 0.25))
    assert offset == 0.25 and nested.tolist() == [0, 0] and (codes == 0).all()


def test_no_scales_have_offset_zero() -> None:
    codes, nested, offset = quantize_absmax(torch.empty(0))
    assert codes.shape == nested.shape == (0,) and offset == 0


def test_scales_whose_mean_passes_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="double_quant=False"):
        quantize_absmax(torch.full((300,), 3e38))

"""Quantization, decoding and AdamW as compiled for two GPUs equal their references, bit by bit where exact."""

from typing import Any

import pytest
import torch
from guarded import Guarded
from nf4_weights import Weight
from torch import Tensor

from minipeft.kernels.emulator import emulate
from minipeft_kernels.adamw.eight_bit import initial_state
from minipeft_kernels.adamw.reference import Hyper, adamw_8bit_reference, adamw_reference
from minipeft_kernels.adamw.triton import launch_adamw, launch_adamw_8bit
from minipeft_kernels.nf4.dequantize import nf4_dequantize_reference
from minipeft_kernels.nf4.dequantize_triton import dequantize_into
from minipeft_kernels.nf4.quantize import nf4_quantize_reference, quantize_absmax_reference
from minipeft_kernels.nf4.quantize_triton import quantize_absmax_into, quantize_into

TARGETS = ("sm_80", "sm_90")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = (7, Hyper(1e-2, 0.9, 0.99, 1e-8, 0.1, False))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("n", [63, 4096, 4133])
def test_quantization_bit_by_bit(target: str, dtype: torch.dtype, blocksize: int, n: int) -> None:
    w = torch.randn(n).to(dtype)
    w[5:9] = torch.tensor([0.0, 2.0**-130, -(2.0**-10), 5.0]).to(dtype)
    codes, absmax = Guarded((n + 1) // 2, 1, dtype=torch.uint8), Guarded(-(-n // blocksize), dtype=torch.float32)
    with emulate(target):
        quantize_into(w, codes.out, absmax.out, blocksize)
    expected_codes, expected_absmax = nf4_quantize_reference(w, blocksize)
    assert torch.equal(codes.check(), expected_codes)
    assert torch.equal(absmax.check(), expected_absmax)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("blocks", [1, 256, 1300])
def test_scales_bit_by_bit(target: str, blocks: int) -> None:
    absmax = torch.rand(blocks) * 3
    absmax[: blocks // 3] = absmax.mean()
    offset = absmax.mean()
    codes, nested = Guarded(blocks, dtype=torch.uint8), Guarded(-(-blocks // 256), dtype=torch.float32)
    with emulate(target):
        quantize_absmax_into(absmax, offset, codes.out, nested.out)
    expected_codes, expected_nested = quantize_absmax_reference(absmax, offset)
    assert torch.equal(codes.check(), expected_codes)
    assert torch.equal(nested.check(), expected_nested)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(32, 64), (7, 151), (150, 192)])
def test_decoding_bit_by_bit(target: str, dtype: torch.dtype, double: bool, shape: tuple[int, int]) -> None:
    weight = Weight(*shape, 64, double)
    out = Guarded(*shape, dtype=dtype)
    with emulate(target):
        dequantize_into(out.out, weight.packed)
    assert torch.equal(out.check(), nf4_dequantize_reference(weight.packed, dtype))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_by_any_scale(target: str, dtype: torch.dtype) -> None:
    """Zero, subnormal, overflowing, infinite and not a number; negative zeros keep their sign."""
    packed = Weight(8, 64, 64, double=False).packed
    scales = torch.tensor([0.0, -0.0, 1e-40, 3e38, 7e4, float("inf"), float("nan"), -1.0])
    packed = packed._replace(absmax=scales)
    ours = torch.empty(8, 64, dtype=dtype)
    with emulate(target):
        dequantize_into(ours, packed)
    right = nf4_dequantize_reference(packed, dtype)
    torch.testing.assert_close(ours, right, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit() & ~ours.isnan(), right.signbit() & ~right.isnan())


def guarded(tensors: list[Tensor]) -> list[Guarded]:
    """Each in a place of its own between guard bytes."""
    places = [Guarded(*t.shape, dtype=t.dtype) for t in tensors]
    for place, t in zip(places, tensors, strict=True):
        place.out.copy_(t)
    return places


# Several tensors in a launch; the sizes that 16 divides and the others go to a launch each.
SIZES = (3, 160, 2048, 2117)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw(target: str, dtype: torch.dtype) -> None:
    params, grads = ([torch.randn(s).to(dtype) for s in SIZES] for _ in range(2))
    moments = [torch.randn(s) for s in SIZES], [torch.rand(s) for s in SIZES]
    groups: Any = (params, *moments)
    places = [guarded(group) for group in groups]
    ours = [[p.out for p in group] for group in places]
    with emulate(target) as run:
        launch_adamw(ours[0], grads, *ours[1:], *NUMBERS)
    assert {launch.constants["ALIGNED"] for launch in run.launches} == {True, False}
    exact = [[t.double() for t in ts] for ts in (params, grads, *moments)]
    from minipeft_kernels.adamw.reference import adamw_update

    for tensors in zip(*exact, strict=True):
        adamw_update(*tensors, *NUMBERS)
    for mine, right in zip(places, (exact[0], *exact[2:]), strict=True):
        for a, b in zip(mine, right, strict=True):
            ulp = torch.finfo(a.out.dtype).eps / 2 if a.out.dtype != torch.float32 else 1e-6
            torch.testing.assert_close(a.check().double(), b, rtol=1.01 * ulp, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_in_8_bits_equals_its_reference(target: str, dtype: torch.dtype) -> None:
    params, grads = ([torch.randn(s).to(dtype) for s in SIZES] for _ in range(2))
    states = list(zip(*map(initial_state, params), strict=True))
    lists = [list(group) for group in (params, *states)]
    # Two steps of the reference first: moments that are not zero.
    for _ in range(2):
        adamw_8bit_reference(lists[0], grads, *lists[1:], *NUMBERS)
    expected = [[t.clone() for t in group] for group in lists]
    adamw_8bit_reference(expected[0], grads, *expected[1:], *NUMBERS)
    with emulate(target):
        launch_adamw_8bit(lists[0], grads, *lists[1:], *NUMBERS)
    for mine, right in zip(lists, expected, strict=True):
        for a, b in zip(mine, right, strict=True):
            if a.dtype == torch.uint8:
                # A moment on the edge between two codes, rounded otherwise in its last bit.
                assert ((a.int() - b.int()).abs() <= 1).all() and (a != b).float().mean() < 0.01
            else:
                torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 8e-3, atol=1e-6)


def test_the_reference_is_not_the_kernel() -> None:
    """The proofs compare two computations: the references launch nothing."""
    params = [torch.randn(32)]
    with emulate("sm_80") as run:
        adamw_reference(params, params, [torch.zeros(32)], [torch.zeros(32)], *NUMBERS)
        nf4_quantize_reference(torch.randn(64), 64)
    assert not run.launches

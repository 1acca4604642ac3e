"""The decoding kernel, in the interpreter, equals the reference bit by bit."""

import pytest
import torch
from guarded import Guarded, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_golden import golden
from torch import Tensor

from minipeft.nf4 import NF4Weight
from minipeft_kernels.nf4.checks import BLOCKSIZES
from minipeft_kernels.nf4.codebooks import NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.dequantize import nf4_dequantize, nf4_dequantize_reference
from minipeft_kernels.nf4.dequantize_triton import dequantize_into
from minipeft_kernels.packed import NF4

# The interpreter computes in numpy, which warns where a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(codes: Tensor, absmax: Tensor, blocksize: int = 64) -> NF4:
    """A weight with float32 scales, as one row."""
    return NF4(codes, absmax, NF4_LEVELS, None, None, None, 1, 2 * codes.numel(), blocksize)


def some_weight(n: int, blocksize: int, double: bool) -> NF4:
    """One row of n weights: codes, scales as stored, and what decodes them."""
    codes = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8)
    blocks = -(-n // blocksize)
    if not double:
        return plain(codes, torch.rand(blocks), blocksize)._replace(columns=n)
    stored = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    nested = (torch.rand(-(-blocks // 256)), dynamic_map(), torch.tensor(0.7))
    return NF4(codes, stored, NF4_LEVELS, *nested, 1, n, blocksize)


def assert_equals_reference(n: int, blocksize: int, double: bool, dtype: torch.dtype, offset: int = 0) -> None:
    weight = some_weight(n, blocksize, double)
    out = Guarded(n, dtype=dtype, offset=offset)
    dequantize_into(out.out, weight)
    assert torch.equal(out.check(), nf4_dequantize_reference(weight, dtype).view(-1))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_and_dtype(blocksize: int, double: bool, dtype: torch.dtype) -> None:
    for n in (0, 1, 2, blocksize - 1, blocksize + 1, 3 * 1024 + 77):
        assert_equals_reference(n, blocksize, double, dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6000),
    st.sampled_from([32, 64, 128, 2048]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
)
def test_any_size_at_any_offset(n: int, blocksize: int, double: bool, dtype: torch.dtype, offset: int) -> None:
    assert_equals_reference(n, blocksize, double, dtype, offset)


def test_scales_that_cross_a_nested_block() -> None:
    assert_equals_reference(64 * 256 * 2 + 64 * 3, 64, True, torch.bfloat16)


@pytest.mark.parametrize("name", ["decode_all_1", "decode_all_pi"])
def test_every_byte_decodes_as_bitsandbytes(name: str) -> None:
    out = Guarded(8, 64, dtype=torch.float32)
    dequantize_into(out.out, plain(golden(f"{name}.packed"), golden(f"{name}.absmax")))
    assert torch.equal(out.check(), golden(f"{name}.out"))


def test_bfloat16_rounds_to_nearest_even() -> None:
    # Scales that put level 15 (1.0) halfway between two bfloat16 numbers, just off, and at the ends of the range.
    ulp = 2.0**-7
    scales = torch.tensor(
        [1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 2.0**-20, 1 + ulp / 2 - 2.0**-20, 1e-40, 3.39e38]
    )
    codes = torch.full((32 * len(scales), 1), 0xFF, dtype=torch.uint8)
    out = Guarded(64 * len(scales), dtype=torch.bfloat16)
    dequantize_into(out.out, plain(codes, scales))
    assert torch.equal(out.check(), scales.bfloat16().repeat_interleave(64))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("double", [True, False])
def test_the_operation_takes_strided_and_offset_tensors(double: bool) -> None:
    weight = some_weight(1000, 64, double)._replace(rows=8, columns=125)
    scattered = (t if t is None or t.ndim == 0 else strided(t) for t in weight.tensors())
    out = nf4_dequantize(NF4(*scattered, 8, 125, 64), torch.float16)  # type: ignore[arg-type]
    assert torch.equal(out, nf4_dequantize_reference(weight, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_goes_there_and_back_alike_in_both_backends(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    w = torch.randn(33, 130).to(dtype)
    there = {}
    for backend in ("triton", "reference"):
        monkeypatch.setenv("MINIPEFT_BACKEND", backend)
        packed = NF4Weight.quantize(w)
        there[backend] = (packed.tensors(), packed.dequantize())
    for name, tensor in there["reference"][0].items():
        assert torch.equal(there["triton"][0][name], tensor), name
    assert torch.equal(there["triton"][1], there["reference"][1])

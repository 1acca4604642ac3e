"""Decoding in compiled CPU code: the reference's bits, at every level that this processor has."""

import pytest
import torch
from guarded import Guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from native_weights import LEVELS, become, by_reference, needs_library, random_state
from nf4_golden import golden

from minipeft.nf4 import NF4Weight
from minipeft_kernels.nf4.codebooks import NF4_LEVELS
from minipeft_kernels.nf4.cpu import decode_range

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = [needs_library, pytest.mark.usefixtures("compiled")]


@given(
    n=st.integers(1, 3000),
    blocksize=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    which=st.sampled_from(LEVELS),
)
@settings(max_examples=150, deadline=None)
def test_any_part_decodes_to_the_references_bits(
    n: int, blocksize: int, double: bool, dtype: torch.dtype, part: tuple[float, float], which: int
) -> None:
    w = random_state(n, blocksize, double)
    first, last = sorted(round(x * n) for x in part)
    buffer = Guarded(last - first, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        become(which, patch)
        decode_range(buffer.out, w.packed(), first, last)
    assert torch.equal(buffer.check(), by_reference(w, dtype)[first:last])


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_out_of_the_usual_range_are_rounded_as_torch_rounds_them(level: int, dtype: torch.dtype) -> None:
    # float16 becomes subnormal, zero and infinite; bfloat16 and float32 subnormal.
    w = random_state(1 << 17, 32, False, exponents=(-149, 127))
    assert torch.equal(w.dequantize(dtype), by_reference(w, dtype))
    w.absmax[0], w.absmax[1] = float("nan"), float("inf")
    odd = w.dequantize(dtype)
    assert odd[:32].isnan().all()
    assert torch.equal(odd[32:64].isinf(), by_reference(w, dtype)[32:64].isinf())


def test_every_byte_decodes_as_bitsandbytes(level: int) -> None:
    for name in ("decode_all_1", "decode_all_pi"):
        codes, absmax = golden(f"{name}.packed").view(-1, 1), golden(f"{name}.absmax")
        w = NF4Weight(codes, absmax, NF4_LEVELS, 64, torch.Size((8, 64)), torch.float32)
        assert torch.equal(w.dequantize(), golden(f"{name}.out"))


def test_a_result_too_large_for_the_caches_has_the_same_bits(level: int) -> None:
    w = random_state(5 << 20, 64, True)
    assert torch.equal(w.dequantize(), by_reference(w, torch.float32))

"""Decoding: every byte, every dtype, ragged ends."""

import numpy as np
import pytest
import torch
from nf4_golden import golden

from minipeft_kernels.nf4 import dequantize
from minipeft_kernels.nf4.codebooks import NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.dequantize import dequantize_absmax, level_pairs, nf4_dequantize
from minipeft_kernels.packed import NF4


def slow(codes: torch.Tensor, absmax: torch.Tensor, n: int, blocksize: int) -> torch.Tensor:
    nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1)[:n].long()
    return NF4_LEVELS[nibbles] * absmax[torch.arange(n) // blocksize]


@pytest.mark.parametrize("name", ["decode_all_1", "decode_all_pi"])
def test_every_byte_decodes_as_bitsandbytes(name: str) -> None:
    packed, absmax = golden(f"{name}.packed"), golden(f"{name}.absmax")
    weight = NF4(packed.view(-1, 1), absmax, NF4_LEVELS, None, None, None, 8, 64, 64)
    out = nf4_dequantize(weight, torch.float32)
    assert torch.equal(out, golden(f"{name}.out"))


@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 128, 999, 4096, 3 * 4096 + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_decoding_equals_one_weight_at_a_time(monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(-(-n // 64))
    expected = slow(codes, absmax, n, 64).to(dtype)
    for chunk in (4096, dequantize.CHUNK):
        monkeypatch.setattr(dequantize, "CHUNK", chunk)
        out = nf4_dequantize(NF4(codes, absmax, NF4_LEVELS, None, None, None, 1, n, 64), dtype)
        assert out.dtype == dtype and torch.equal(out, expected.view(1, n))


def test_a_pair_holds_the_high_level_first() -> None:
    pairs = level_pairs(NF4_LEVELS).view(torch.float32).view(256, 2)
    assert torch.equal(pairs[0x3C], NF4_LEVELS[[3, 12]])


def test_scales_multiply_and_add_with_a_rounding_each() -> None:
    codes = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    nested, offset = torch.rand(4), torch.tensor(0.7)
    product = dynamic_map()[codes.long()].numpy() * nested.numpy()[np.arange(1000) // 256]
    apart = product + np.float32(0.7)
    fused = (dynamic_map()[codes.long()].double() * nested[torch.arange(1000) // 256].double() + 0.7).float()
    ours = dequantize_absmax(codes, nested, dynamic_map(), offset)
    np.testing.assert_array_equal(ours.numpy(), apart)
    assert not torch.equal(ours, fused)  # the case tells the two apart

"""The byte-permute decode, instruction by instruction: every code in every place, to the bit."""

import numpy as np
import pytest
import torch
from inline_asm import run

from minipeft_kernels.nf4 import permutes_triton as permutes
from minipeft_kernels.nf4.codebooks import NF4_LEVELS

TABLES = {torch.bfloat16: permutes._TABLE_BF16, torch.float16: permutes._TABLE_FP16}


def planes(levels: torch.Tensor, dtype: torch.dtype, count: int) -> list[np.ndarray]:
    """The ten words of `prmt_assembly`, made by the kernels' own assembly, each `count` times."""
    bits = levels.numpy().view(np.uint32)
    words = [run(TABLES[dtype].value, 2, [np.full(count, b) for b in bits[i : i + 4]]) for i in range(0, 16, 4)]
    factors = run(permutes._SHIFT_FACTORS.value, 2, [np.full(count, bits[0])])
    return [low for low, _ in words] + [high for _, high in words] + factors


def decoded(words: np.ndarray, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint32 words of four packed bytes -> (words, 8) levels."""
    pairs = run(permutes.prmt_assembly(stride=1), 4, [words, *planes(levels, dtype, len(words))])
    return torch.from_numpy(np.stack(pairs, 1).view(np.int16).copy()).view(dtype)


def expected(words: np.ndarray, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    packed = torch.from_numpy(words.view(np.uint8).astype(np.int64))
    codes = torch.stack([packed >> 4, packed & 15], 1).view(len(words), 8)
    return levels[codes].to(dtype)


@pytest.mark.parametrize("dtype", TABLES)
@pytest.mark.parametrize("own", [False, True])
def test_every_byte_in_every_place_decodes_to_its_two_levels(dtype: torch.dtype, own: bool) -> None:
    levels = torch.randn(16) if own else NF4_LEVELS
    byte = np.arange(256, dtype=np.uint32)
    noise = np.random.default_rng(0).integers(0, 1 << 32, 256, dtype=np.uint32)
    for place in range(4):
        shift = np.uint32(8 * place)
        words = noise & ~(np.uint32(0xFF) << shift) | byte << shift
        ours, right = decoded(words, levels, dtype), expected(words, levels, dtype)
        assert torch.equal(ours.view(torch.int16), right.view(torch.int16))


def test_the_factors_are_those_of_the_shifts() -> None:
    by_16, by_31 = run(permutes._SHIFT_FACTORS.value, 2, [np.zeros(1, np.uint32)])
    assert by_16 == 1 << 16 and by_31 == 1 << 31
    assert run(permutes._LANE_ZERO.value, 1, [np.zeros(1, np.uint32)])[0] == 0


def test_the_two_forms_of_the_assembly_are_one() -> None:
    """Over bytes an argument is named four times, so operands lie four apart; nothing else differs."""
    bytes_form, words_form = permutes.prmt_assembly(stride=4), permutes.prmt_assembly(stride=1)
    for i in reversed(range(10)):
        bytes_form = bytes_form.replace(f"${5 + 4 * i},", f"#{i},").replace(f"${5 + 4 * i};", f"#{i};")
        words_form = words_form.replace(f"${5 + i},", f"#{i},").replace(f"${5 + i};", f"#{i};")
    assert bytes_form == words_form

"""NF4 codes and scales back to numbers: level[code] * absmax, the product in float32, then rounded to the dtype."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, nf4_native
from .codebooks import NF4_LEVELS
from .dispatch import use_native, use_triton
from .registration import define_op

# Weights decoded at a time. 4096x4096 to float32 on 2 cores: 43 ms all at once, 9.0 at 2^15, 5.7 at 2^17,
# 4.9 at 2^18, 4.2 at 2^20 (64 KB, 512 KB, 1 MB and 4 MB of float32).
CHUNK = 1 << 18


def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_map: Tensor | None = None,
    offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    """Decode a whole weight.

    Args:
        codes: uint8 ((n+1)//2, 1), the earlier weight in the high half of a byte.
        absmax: float32 (blocks,), or uint8 (blocks,) when doubly quantized, with the three tensors below.
        quant_map: float32 (16,), the level of each code.
        shape: of the result, n elements.
        blocksize: weights that share a scale.
        dtype: of the result; the product is rounded to it from float32.
        nested_absmax, nested_map, offset, nested_blocksize: as `dequantize_absmax` takes them, or None.

    Returns:
        Tensor of `shape` and `dtype`.
    """
    packed = (codes, absmax, quant_map, nested_absmax, nested_map, offset)
    out: Tensor = _nf4_dequantize_op(*packed, shape, blocksize, nested_blocksize, dtype)
    return out


def nf4_dequantize_reference(
    codes: Tensor, absmax: Tensor, quant_map: Tensor, n: int, blocksize: int, dtype: torch.dtype
) -> Tensor:
    """Decode n weights with float32 scales, in PyTorch, a chunk at a time: (n,)."""
    pairs = level_pairs(quant_map)
    packed = codes.reshape(-1)
    # An odd end decodes its padding too; it is cut off below.
    out = torch.empty(packed.numel() * 2, dtype=dtype, device=codes.device)
    size = min(CHUNK, out.numel())
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    buffer = None if dtype == torch.float32 else torch.empty(size, dtype=torch.float32, device=codes.device)
    for start in range(0, out.numel(), CHUNK):
        target = out[start : start + CHUNK]
        part = packed[start // 2 : (start + CHUNK) // 2]
        scales = absmax[start // blocksize :]
        if buffer is None:
            decode_into(target, part, scales, pairs, blocksize, index)
        else:
            target.copy_(decode_into(buffer[: target.numel()], part, scales, pairs, blocksize, index))
    return out if out.numel() == n else out[:n].clone()


def level_pairs(quant_map: Tensor) -> Tensor:
    """The two levels that each byte stands for, as one 64-bit number: float32 (16,) -> int64 (256,)."""
    # A comparison is a tenth of the work, which a small layer would feel.
    if quant_map.device.type == "cpu" and torch.equal(quant_map, NF4_LEVELS):
        return _standard_pairs()
    return _make_pairs(quant_map)


@functools.cache
def _standard_pairs() -> Tensor:
    return _make_pairs(NF4_LEVELS)


def _make_pairs(quant_map: Tensor) -> Tensor:
    byte = torch.arange(256, device=quant_map.device)
    # (256, 2) float32 -> (256, 1) int64 -> (256,)
    return torch.stack([quant_map[byte >> 4], quant_map[byte & 15]], dim=1).view(torch.int64).view(-1)


def decode_into(out: Tensor, codes: Tensor, absmax: Tensor, pairs: Tensor, blocksize: int, index: Tensor) -> Tensor:
    """Decode bytes that start at a block's start into `out`, and return it.

    Args:
        out: float32 (2m,), overwritten.
        codes: uint8 (m,).
        absmax: float32, the first ceil(2m/blocksize) are used.
        pairs: of `level_pairs`.
        blocksize: weights that share a scale.
        index: int32 (m,) or longer, overwritten.
    """
    index = index[: codes.numel()]
    index.copy_(codes)
    # One look-up a byte gives both its levels: half the look-ups, and 8 bytes copied at once.
    torch.index_select(pairs, 0, index, out=out.view(torch.int64))
    full = out.numel() // blocksize
    out[: full * blocksize].view(full, blocksize).mul_(absmax[:full].unsqueeze(1))
    if full * blocksize < out.numel():
        out[full * blocksize :].mul_(absmax[full])
    return out


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_map: Tensor, offset: Tensor, nested_blocksize: int = 256
) -> Tensor:
    """8-bit scales back to float32: map[code] * nested_absmax + offset, multiplied and added with a rounding each.

    Args:
        codes: uint8 (blocks,).
        nested_absmax: float32 (ceil(blocks/nested_blocksize),).
        nested_map: float32 (256,).
        offset: float32 ().
        nested_blocksize: scales that share a nested scale.

    Returns:
        float32 (blocks,).
    """
    scales = nested_map.index_select(0, codes.int())
    scales *= nested_absmax.repeat_interleave(nested_blocksize)[: codes.numel()]
    scales += offset
    return scales


def _run_nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    size = torch.Size(shape)
    if use_triton(codes):
        from .nf4_dequantize_triton import dequantize_into

        out = torch.empty(size, dtype=dtype, device=codes.device)
        nested = (nested_absmax, nested_map, offset)
        return dequantize_into(out, codes, absmax, quant_map, *nested, blocksize, nested_blocksize)
    if use_native(codes) and dtype in native.DTYPES:
        out = torch.empty(size, dtype=dtype)
        packed = (codes, absmax, quant_map, nested_absmax, nested_map, offset)
        return nf4_native.decode_into(out, packed, (size.numel(), 1, blocksize, nested_blocksize), 0, size.numel())
    if nested_absmax is not None:
        assert nested_map is not None and offset is not None
        absmax = dequantize_absmax(absmax, nested_absmax, nested_map, offset, nested_blocksize)
    return nf4_dequantize_reference(codes, absmax, quant_map, size.numel(), blocksize, dtype).view(size)


def _fake_nf4_dequantize(codes: Tensor, *args: Any) -> Tensor:
    *_, shape, _, _, dtype = args
    return torch.empty(shape, dtype=dtype, device=codes.device)


_nf4_dequantize_op = define_op(
    "nf4_dequantize(Tensor codes, Tensor absmax, Tensor quant_map, Tensor? nested_absmax, Tensor? nested_map, "
    "Tensor? offset, SymInt[] shape, int blocksize, int nested_blocksize, ScalarType dtype) -> Tensor",
    _run_nf4_dequantize,
    fake=_fake_nf4_dequantize,
)

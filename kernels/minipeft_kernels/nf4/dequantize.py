"""NF4 codes and scales back to numbers: level[code] * absmax, the product in float32, then rounded to the dtype."""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..dispatch import use_native, use_triton
from ..packed import NF4, SCHEMA, unflatten
from ..registration import define_op
from .checks import check_dequantize
from .codebooks import NF4_LEVELS
from .cpu import decode_range

# Weights decoded at a time. 4096x4096 to float32 on 2 cores: 43 ms all at once, 9.0 at 2^15, 5.7 at 2^17,
# 4.9 at 2^18, 4.2 at 2^20 (64 KB, 512 KB, 1 MB and 4 MB of float32).
CHUNK = 1 << 18


def nf4_dequantize(weight: NF4, dtype: torch.dtype) -> Tensor:
    """Decode a whole weight: level * scale in float32, rounded to `dtype` once.

    Args:
        weight: n = rows * columns weights in NF4 (Dettmers et al. 2023, section 3).
        dtype: of the result.

    Returns:
        (rows, columns) in `dtype`.
    """
    out: Tensor = _nf4_dequantize_op(dtype, *weight)
    return out


def nf4_dequantize_reference(weight: NF4, dtype: torch.dtype) -> Tensor:
    """`nf4_dequantize` in PyTorch, a chunk at a time: (rows, columns)."""
    n, blocksize = weight.rows * weight.columns, weight.blocksize
    all_scales, pairs, codes = (
        scales_of(weight),
        level_pairs(weight.quant_map),
        weight.codes.reshape(-1)[: (n + 1) // 2],
    )
    # An odd end decodes its padding too; it is cut off below.
    out = torch.empty(codes.numel() * 2, dtype=dtype, device=codes.device)
    step = max(1, CHUNK // blocksize) * blocksize
    size = min(step, out.numel())
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    buffer = None if dtype == torch.float32 else torch.empty(size, dtype=torch.float32, device=codes.device)
    for start in range(0, out.numel(), step):
        target = out[start : start + step]
        part = codes[start // 2 : (start + step) // 2]
        scales = all_scales[start // blocksize :]
        if buffer is None:
            decode_blocks(target, part, scales, pairs, blocksize, index)
        else:
            target.copy_(decode_blocks(buffer[: target.numel()], part, scales, pairs, blocksize, index))
    out = out if out.numel() == n else out[:n].clone()
    return out.view(weight.rows, weight.columns)


def scales_of(weight: NF4) -> Tensor:
    """The scale of each block, float32 (blocks,)."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_map is not None and weight.offset is not None
    nested = (weight.nested_absmax, weight.nested_map, weight.offset, weight.nested_blocksize)
    return dequantize_absmax(weight.absmax, *nested)


def level_pairs(quant_map: Tensor) -> Tensor:
    """The two levels that each byte stands for, as one 64-bit number: float32 (16,) -> int64 (256,)."""
    # Comparing takes a tenth of the time that making the pairs does, which a small layer would notice.
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


def decode_blocks(out: Tensor, codes: Tensor, absmax: Tensor, pairs: Tensor, blocksize: int, index: Tensor) -> Tensor:
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
    scales *= nested_absmax.repeat_interleave(min(nested_blocksize, codes.numel()))[: codes.numel()]
    scales += offset
    return scales


def _run(dtype: torch.dtype, *flat_weight: Any) -> Tensor:
    weight = unflatten(flat_weight)
    assert isinstance(weight, NF4)
    if use_triton(weight.codes):
        from .dequantize_triton import dequantize_into

        return dequantize_into(_fake(dtype, *weight), weight)
    if use_native(weight.codes) and dtype in native.DTYPES:
        return decode_range(_fake(dtype, *weight), weight, 0, weight.rows * weight.columns)
    return nf4_dequantize_reference(weight, dtype)


def _fake(dtype: torch.dtype, *flat_weight: Any) -> Tensor:
    weight = unflatten(flat_weight)
    assert isinstance(weight, NF4)
    return torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.codes.device)


_nf4_dequantize_op = define_op(
    f"nf4_dequantize(ScalarType dtype, {SCHEMA}) -> Tensor", _run, fake=_fake, check=check_dequantize
)

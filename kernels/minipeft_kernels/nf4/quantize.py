"""Quantization to NF4: blocks of weights become 4-bit codes and one scale each (Dettmers et al. 2023, section 3).

The arithmetic is bitsandbytes 0.50.2's on CPU, bit by bit, so that either library's files are the other's. One thing
differs: a doubly quantized scale takes the nearest entry of its map, where bitsandbytes looks it up by the nearest of
65,536 bins, and so takes the neighbour for one scale of 600.
"""

import functools

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..registration import define_op
from .checks import check_blocksize, check_quantize, check_quantize_absmax
from .codebooks import (
    MIN_ABSMAX,
    NESTED_BLOCKSIZE,
    NF4_BOUNDARIES,
    NF4_ZERO_CODE,
    Tables,
    count_below,
    dynamic_map,
    exact_thresholds,
    upper_half_tables,
)

# Weights quantized at a time. 4096x4096 float32, one thread: 49 ms at 2^15, 41 at 2^17, 53 at 2^19.
CHUNK = 1 << 17


def nf4_quantize(w: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a weight to NF4 in blocks of consecutive elements of its row-major order.

    A block's scale is its largest magnitude; each weight, divided by it, takes the code of the nearest level, a tie
    the lower one. The last block may be shorter.

    Args:
        w: (...), float32, bfloat16 or float16, all finite.
        blocksize: weights that share a scale; a power of two from 32 to 4096.

    Returns:
        codes, uint8 ((n+1)//2, 1): two codes a byte, the earlier weight in the high half; an odd end is padded with
        the code of zero. absmax, float32 (blocks,).

    Raises:
        TypeError: another dtype. ValueError: another blocksize, or a weight that is not finite (names the first).
    """
    check_blocksize(blocksize)
    codes, absmax = _nf4_quantize_op(w, blocksize)
    return codes, absmax


def nf4_quantize_reference(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """`nf4_quantize` in PyTorch, a chunk at a time; a weight that is not finite is not looked for."""
    flat = w.reshape(-1)
    n = flat.numel()
    codes, absmax = _empty_codes(w, blocksize)
    for start in range(0, n, CHUNK):
        chunk = flat[start : start + CHUNK].float()
        scales = absmax[start // blocksize : -(-(start + chunk.numel()) // blocksize)]
        scaled = _scale_blocks(chunk, scales, blocksize)
        _pack(_nearest_codes(scaled), codes.view(-1)[start // 2 : (start + CHUNK) // 2])
    return codes, absmax


def _empty_codes(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    codes = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=w.device)
    return codes, torch.empty(-(-n // blocksize), dtype=torch.float32, device=w.device)


def _run_nf4_quantize(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if use_triton(w):
        from .quantize_triton import quantize_into

        codes, absmax = _empty_codes(w, blocksize)
        quantize_into(w.contiguous(), codes, absmax, blocksize)
    else:
        codes, absmax = nf4_quantize_reference(w, blocksize)
    _check_finite(w, absmax, blocksize)
    return codes, absmax


def _scale_blocks(chunk: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    """Write each block's absmax into `scales` and return the chunk divided by it: (m,), (blocks,) -> (m,)."""
    full = chunk.numel() // blocksize * blocksize
    blocks = chunk[:full].view(-1, blocksize)
    if full:
        whole = scales[: full // blocksize]
        torch.amax(blocks.abs(), dim=1, out=whole)
        # A product with the rounded reciprocal, not a quotient: the last bit decides near a boundary.
        scaled = (blocks * whole.clamp(min=MIN_ABSMAX).reciprocal().unsqueeze(1)).view(-1)
        if full == chunk.numel():
            return scaled
    # As in bitsandbytes, a short last block is divided by its scale, and the stored scale is at least MIN_ABSMAX.
    tail = chunk[full:]
    scales[-1] = tail.abs().amax().clamp(min=MIN_ABSMAX)
    tail = tail / scales[-1]
    return torch.cat([scaled, tail]) if full else tail


def _nearest_codes(scaled: Tensor) -> Tensor:
    """The number of boundaries below each number, its code: float32 (m,) in [-1, 1] -> uint8 (m,)."""
    return count_below(scaled, _boundary_tables(scaled.device))


@functools.cache
def _boundary_tables(device: torch.device) -> Tables:
    lowest, boundary = upper_half_tables(NF4_BOUNDARIES)
    return lowest.to(device), boundary.to(device)


@functools.cache
def _scale_tables(device: torch.device) -> Tables:
    lowest, threshold = upper_half_tables(exact_thresholds(dynamic_map()))
    return lowest.to(device), threshold.to(device)


def _pack(codes: Tensor, out: Tensor) -> None:
    """Two codes a byte, the first in the high half: uint8 (m,) -> uint8 ((m+1)//2,)."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), NF4_ZERO_CODE)])
    torch.bitwise_or(codes[0::2] << 4, codes[1::2], out=out)


def _check_finite(w: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Raise ValueError for a weight that is not finite. Only blocks whose absmax is not finite are searched."""
    bad = ~torch.isfinite(absmax)
    if not bool(bad.any()):
        return
    flat = w.reshape(-1)
    start = int(bad.nonzero()[0, 0]) * blocksize
    block = flat[start : start + blocksize]
    position = start + int((~torch.isfinite(block)).nonzero()[0, 0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position, device="cpu"), w.shape))
    raise ValueError(f"NF4 needs finite weights: the weight at index {index} is {flat[position].item()}")


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves to 8 bits ("double quantization", QLoRA section 3).

    Their mean is taken off, and the rest goes in blocks of 256 to the nearest entry of the dynamic map, a tie to the
    lower one.

    Args:
        absmax: (blocks,) float32.

    Returns:
        codes uint8 (blocks,), nested absmax float32 (ceil(blocks/256),), offset float32 ().

    Raises:
        ValueError: the mean passes the range of float32.
    """
    codes, nested, offset = _quantize_absmax_op(absmax)
    return codes, nested, offset


def quantize_absmax_reference(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and nested absmax of `quantize_absmax`, in PyTorch."""
    blocks = -(-absmax.numel() // NESTED_BLOCKSIZE)
    centred = absmax.new_zeros(blocks * NESTED_BLOCKSIZE)
    torch.sub(absmax, offset, out=centred[: absmax.numel()])
    centred = centred.view(blocks, NESTED_BLOCKSIZE)
    nested = centred.abs().amax(dim=1)
    # A block of zeros gives 0 * inf, for which bitsandbytes stores code 0; its nested scale of 0 makes any code right.
    scaled = (centred * nested.reciprocal().unsqueeze(1)).nan_to_num(nan=-1.0)
    codes = count_below(scaled, _scale_tables(absmax.device))
    return codes.view(-1)[: absmax.numel()].clone(), nested


def _run_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if absmax.numel() == 0:
        return absmax.to(torch.uint8), absmax.clone(), absmax.new_zeros(())
    offset = absmax.mean()
    if not bool(torch.isfinite(offset)):
        raise ValueError(
            f"the mean of the block scales passes float32 (largest scale {absmax.max().item():g}): "
            "quantize with double_quant=False"
        )
    if not use_triton(absmax):
        return *quantize_absmax_reference(absmax, offset), offset
    from .quantize_triton import quantize_absmax_into

    codes, nested, _ = _fake_quantize_absmax(absmax)
    quantize_absmax_into(absmax.contiguous(), offset, codes, nested)
    return codes, nested, offset


def _fake_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty(absmax.numel(), dtype=torch.uint8, device=absmax.device)
    return codes, absmax.new_empty(-(-absmax.numel() // NESTED_BLOCKSIZE)), absmax.new_empty(())


_nf4_quantize_op = define_op(
    "nf4_quantize(Tensor w, int blocksize) -> (Tensor codes, Tensor absmax)",
    _run_nf4_quantize,
    fake=_empty_codes,
    check=check_quantize,
)
_quantize_absmax_op = define_op(
    "quantize_absmax(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor offset)",
    _run_quantize_absmax,
    fake=_fake_quantize_absmax,
    check=check_quantize_absmax,
)

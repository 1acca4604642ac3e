"""AdamW's moments in 8 bits, block by block (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

256 neighbours share a float32 scale, their largest magnitude; each is, divided by it, the nearest of 256 entries of a
dynamic map: the signed one for the first moment, the unsigned one, which has twice the entries above zero, for the
second. So one outlier spoils the precision of its block alone. One rule is ours: a second moment that is not zero
never takes the code of zero, since the update divides by its root, and by eps alone where it is zero.
"""

import functools

import torch
from torch import Tensor

from ..nf4.codebooks import Tables, count_below, dynamic_map, exact_thresholds, upper_half_tables

STATE_BLOCKSIZE = 256
SMALLEST = 2.0**-149  # of float32


@functools.cache
def state_map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map, float32 (256,), and the thresholds between its entries, float32 (255,)."""
    entries = dynamic_map(signed)
    return entries.to(device), exact_thresholds(entries).to(device)


@functools.cache
def _tables(signed: bool, device: torch.device) -> Tables:
    lowest, threshold = upper_half_tables(exact_thresholds(dynamic_map(signed)))
    return lowest.to(device), threshold.to(device)


def initial_state(p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state of a parameter before its first step: all zeros.

    Returns:
        exp_avg codes, uint8 of p's shape; exp_avg absmax, float32 (ceil(numel/256),); and the same for exp_avg_sq.
    """
    blocks = -(-p.numel() // STATE_BLOCKSIZE)
    zeros = [int((dynamic_map(signed) == 0).nonzero()) for signed in (True, False)]
    m_codes, v_codes = (torch.full(p.shape, zero, dtype=torch.uint8, device=p.device) for zero in zeros)
    m_absmax, v_absmax = (torch.zeros(blocks, dtype=torch.float32, device=p.device) for _ in range(2))
    return m_codes, m_absmax, v_codes, v_absmax


def dequantize_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """map[code] * absmax of its block: uint8 (n,), float32 (ceil(n/256),) -> float32 (n,)."""
    entries, _ = state_map(signed, codes.device)
    x = entries.index_select(0, codes.int())
    _whole_blocks(x).mul_(absmax[: x.numel() // STATE_BLOCKSIZE].unsqueeze(1))
    if x.numel() % STATE_BLOCKSIZE:
        x[-(x.numel() % STATE_BLOCKSIZE) :] *= absmax[-1]
    return x


def quantize_state(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Encode x, float32 (n,), into `codes`, uint8 (n,), and `absmax`, float32 (ceil(n/256),)."""
    if x.numel() % STATE_BLOCKSIZE:
        whole = x.numel() // STATE_BLOCKSIZE * STATE_BLOCKSIZE
        quantize_state(x[:whole], codes[:whole], absmax[:-1], signed)
        _quantize_blocks(x[whole:].unsqueeze(0), codes[whole:], absmax[-1:], signed)
    elif x.numel():
        _quantize_blocks(_whole_blocks(x), codes, absmax, signed)


def _whole_blocks(x: Tensor) -> Tensor:
    blocks = x.numel() // STATE_BLOCKSIZE
    return x[: blocks * STATE_BLOCKSIZE].view(blocks, STATE_BLOCKSIZE)


def _quantize_blocks(blocks: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    torch.amax(blocks.abs(), dim=1, out=absmax)
    # The smallest divisor keeps a block of zeros at 0, and changes no other: the smallest magnitude is one of those.
    scaled = blocks / absmax.clamp(min=SMALLEST).unsqueeze(1)
    found = count_below(scaled, _tables(signed, blocks.device))
    if not signed:
        found = torch.maximum(found, (blocks > 0).view(torch.uint8))
    codes.copy_(found.view(-1))

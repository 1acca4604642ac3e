"""AdamW's moments in 8 bits, block by block (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

256 neighbours share a float32 scale, their largest magnitude; each is, divided by it, the nearest of 256 entries of a
dynamic map: the signed one for the first moment, the unsigned one, which has twice the entries above zero, for the
second. So one outlier spoils the precision of its block alone. One rule is ours: a second moment that is not zero
never takes the code of zero, since the update divides by its root, and by eps alone where it is zero.
"""

import functools

import torch
from torch import Tensor

from .codebooks import dynamic_map, exact_thresholds

STATE_BLOCKSIZE = 256


@functools.cache
def state_tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map, float32 (256,), and the thresholds between its entries, float32 (255,)."""
    entries = dynamic_map(signed)
    return entries.to(device), exact_thresholds(entries).to(device)


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
    entries, _ = state_tables(signed, codes.device)
    scales = absmax.repeat_interleave(STATE_BLOCKSIZE)[: codes.numel()]
    return entries.index_select(0, codes.int()).mul_(scales)


def quantize_state(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool) -> None:
    """Encode x, float32 (n,), into `codes`, uint8 (n,), and `absmax`, float32 (ceil(n/256),)."""
    _, thresholds = state_tables(signed, x.device)
    padded = x.new_zeros(absmax.numel(), STATE_BLOCKSIZE)
    padded.view(-1)[: x.numel()] = x
    torch.amax(padded.abs(), dim=1, out=absmax)
    scaled = (padded / absmax.unsqueeze(1)).nan_to_num_(nan=0.0)  # a block of zeros: 0/0
    found = torch.bucketize(scaled, thresholds, out_int32=True)
    if not signed:
        found = torch.maximum(found, (padded > 0).int())
    codes.copy_(found.view(-1)[: x.numel()])

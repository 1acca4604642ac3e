"""The right results, in float64 and written to be obvious: nothing of minipeft computes here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import distance
from benchmarks.shapes import BLOCKSIZE, Layer
from minipeft.nf4 import NF4Weight

# The largest right `distance` of a product of a few thousand terms, by the dtype of its factors and result. One block
# of 64 weights gone wrong in a row of 4096 is 0.1 and more.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}

# Of the 8-bit map, as a part of its largest entry: the topmost 64 entries are 0.9/64 apart; with room for rounding.
WIDEST_HALF_STEP = 0.0072


def packed_weight(layer: Layer, dtype: torch.dtype, device: torch.device) -> NF4Weight:
    """A random weight of a layer, doubly quantized.

    Quantized on the CPU: what is measured on a GPU must not hang on whether quantizing works there.
    """
    w = (0.02 * torch.randn(layer.out_features, layer.in_features)).to(dtype)
    return NF4Weight.quantize(w, BLOCKSIZE, double_quant=True).to(device)


def decoded(weight: NF4Weight) -> Tensor:
    """The numbers that an NF4 weight stands for, float64."""
    packed = weight.codes.view(-1).long()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: weight.shape.numel()]
    absmax = block_scales(weight).repeat_interleave(weight.blocksize)[: weight.shape.numel()]
    return (weight.quant_map.double()[codes] * absmax).view(weight.shape)


def block_scales(weight: NF4Weight) -> Tensor:
    """The scale of each block, float64 (blocks,)."""
    if weight.nested_absmax is None or weight.nested_quant_map is None or weight.offset is None:
        return weight.absmax.double()
    nested = weight.nested_absmax.double().repeat_interleave(weight.nested_blocksize)[: weight.absmax.numel()]
    return weight.nested_quant_map.double()[weight.absmax.long()] * nested + weight.offset.double()


def quantization_error(w: Tensor, quant_map: Tensor, blocksize: int, codes: Tensor, absmax: Tensor) -> float:
    """The distance of codes and scales from the best ones, in units of the largest that is right: up to 1.

    Args:
        w: (n,), n a multiple of blocksize. quant_map: (16,).
        codes: uint8 (n/2, 1). absmax: (n/blocksize,), rounded however it is stored.

    Returns:
        The larger of: the most that a weight lies further from its level than from the nearest level, where float32's
        rounding of a weight near a boundary is right; the largest error of a scale, where half the widest step of the
        8-bit map is.
    """
    blocks = w.double().view(-1, blocksize)
    largest = blocks.abs().amax(1)
    packed = codes.view(-1).long()
    chosen = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    scaled = (blocks / largest.clamp(min=1e-38).unsqueeze(1)).view(-1)
    levels = quant_map.double()
    # Levels ascend: the nearest is one of the two that a number lies between.
    above = torch.bucketize(scaled, levels).clamp(1, 15)
    best = torch.minimum((scaled - levels[above]).abs(), (scaled - levels[above - 1]).abs())
    further = float(((scaled - levels[chosen]).abs() - best).max())
    scale = float((absmax.double() - largest).abs().max() / (largest - largest.mean()).abs().max())
    return max(further / 1e-6, scale / WIDEST_HALF_STEP)


def near(right: Callable[[], Tensor | Sequence[Tensor]]) -> Callable[[Any], float]:
    """The error of a result: its `distance` from what `right` gives, which is computed once, when first asked for."""
    known: list[Tensor | Sequence[Tensor]] = []

    def error(result: Any) -> float:
        if not known:
            known.append(right())
        return distance(result, known[0])

    return error


def adamw_steps(
    p: Tensor, grads: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Tensor:
    """The parameter after a step with each of `grads` from zero moments (Loshchilov and Hutter 2019, algorithm 2)."""
    beta1, beta2 = betas
    p = p.double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr * weight_decay * p
        p = p - lr * (m / (1 - math.pow(beta1, t))) / ((v / (1 - math.pow(beta2, t))).sqrt() + eps)
    return p

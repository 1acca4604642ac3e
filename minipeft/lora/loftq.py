"""LoftQ (Li et al. 2023): an adapter that starts from what quantization lost, on a base quantized to suit it.

Algorithm 1 of the paper, with T = `loftq_iter`: from A = B = 0, in turn Q = quantize(W - s B A), then s B A = the
leading r components of W - Q. What acts is Q + s B A, nearer to W than its plain quantization: a start for QLoRA.

PEFT writes Q into the base weight. Here the plain layer keeps W, and the adapter holds Q, packed in NF4, which stands
in for W while the adapter acts: disabling, deleting and unloading give W back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from minipeft.nf4 import NF4Linear, NF4Weight


@dataclasses.dataclass
class LoftQConfig:
    """PEFT's `LoftQConfig`.

    Args:
        loftq_bits: 4, for NF4: the one kind of quantization that minipeft has.
        loftq_iter: T, the rounds of algorithm 1.

    Raises ValueError for other bits, and fewer than 1 round.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits != 4:
            raise ValueError(f"loftq_bits must be 4 (NF4), got {self.loftq_bits!r}")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise ValueError(f"loftq_iter must be a positive whole number, got {self.loftq_iter!r}")


class LoftqBase(NF4Linear):
    """Q: the packed weight that acts in the place of a plain layer's. No file holds it: it follows from W."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def of(cls, packed: NF4Weight, device: torch.device) -> LoftqBase:
        """The layer with this weight (out_features, in_features)."""
        out_features, in_features = packed.shape
        kwargs: dict[str, Any] = {"double_quant": False, "dtype": packed.dtype, "device": device}
        base = cls(in_features, out_features, bias=False, **kwargs)
        base.set_weight(packed)
        return base


@torch.no_grad()
def loftq(weight: Tensor, r: int, scaling: float, rounds: int) -> tuple[NF4Weight, Tensor, Tensor]:
    """Q, A (r, in_features) and B (out_features, r) such that Q + s B A is near `weight` (out_features, in_features).

    Those of the best round, so that more rounds are never worse.

    Raises ValueError when the weight has no rank r.
    """
    if r > min(weight.shape):
        raise ValueError(f"init_lora_weights='loftq': r is {r}, but the weight {tuple(weight.shape)} has no such rank")
    low, best, smallest = torch.zeros_like(weight), None, math.inf
    for _ in range(rounds):
        packed = NF4Weight.quantize(weight - low, double_quant=False)
        lost = weight - packed.dequantize(weight.dtype)
        lora_A, lora_B = leading_factors(lost, r, scaling)
        low = scaling * lora_B @ lora_A
        error = (lost - low).norm().item()
        # Rounds can undo a little of what those before gained, as a block's scale follows its largest weight.
        if best is None or error < smallest:
            best, smallest = (packed, lora_A, lora_B), error
    assert best is not None
    return best


def leading_factors(matrix: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B such that s B A is the best approximation of rank r to `matrix`, its singular values split evenly."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:r] / scaling).sqrt()
    return root[:, None] * right[:r], left[:, :r] * root

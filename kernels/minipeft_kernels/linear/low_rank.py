"""LoRA's update as the operations take it; its products are in `thin.py`."""

from __future__ import annotations

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float]
"""(A (r, in_features), B (out_features, r), s): the update s (x A^T) B^T."""

LowRank = tuple[Tensor, Tensor]
"""(low, up), an update as it is added to a base product: low (M, r), which has s in it, and up, the factor B (N, r) of
the forward or A (r, K) of the input gradient."""


def update_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """The dtype of x A^T: autocast's under autocast, else the wider of x's and A's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, lora_A.dtype)

"""The products of LoRA's update, which all have r columns on one side, each in the form that is fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import cast, dense_product

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


def project(rows: Tensor, lora_A: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """low = s x A^T in `dtype`: (M, K) and (r, K) -> (M, r)."""
    return dense_product(cast(rows, dtype), cast(lora_A, dtype), scaling)


def project_back(dy: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """g = s dy B in the dtype of dy: (M, N) and (N, r) -> (M, r)."""
    return dense_product(dy, cast(lora_B, dy.dtype).T, scaling)


def grad_of_A(grad_low: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """dA = g^T x in `dtype`: (M, r) and (M, K) -> (r, K)."""
    return cast(dense_product(grad_low.T, cast(rows, grad_low.dtype).T), dtype)


def grad_of_B(dy: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """dB = dy^T low in `dtype`: (M, N) and (M, r) -> (N, r).

    On a CPU made as its transpose, low^T dy, whose left factor is the small one: 408 microseconds with the
    transposition back against 1105 (M = 1024, N = 1536, r = 16, float32).
    """
    if low.is_cpu:
        return cast(dense_product(low.T, dy.T).T, dtype).contiguous()
    return cast(dense_product(dy.T, low.T), dtype)

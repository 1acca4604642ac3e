"""The products of LoRA's update, which all have r columns on one side, each in the form that is fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .dense import product
from .nf4_matmul import as_rows, from_rows


def adapter_dtype(x: Tensor, lora_A: Tensor) -> torch.dtype:
    """What x A^T is computed in: autocast's dtype under autocast, else the wider of x's and A's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, lora_A.dtype)


def project(rows: Tensor, lora_A: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """low = s x A^T in `dtype`: (M, K) and (r, K) -> (M, r)."""
    return product(rows.to(dtype), lora_A.to(dtype)).mul_(scaling)


def project_back(dy: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s dy B in the dtype of dy: (M, N) and (N, r) -> (M, r)."""
    return product(dy, lora_B.to(dy.dtype).T).mul_(scaling)


def grad_of_A(grad_low: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_low^T x in `dtype`: (M, r) and (M, K) -> (r, K)."""
    return product(grad_low.T, rows.to(grad_low.dtype).T).to(dtype)


def grad_of_B(dy: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T low in `dtype`: (M, N) and (M, r) -> (N, r).

    Made as its transpose, low^T dy, whose left factor is the small one: 408 microseconds with the transposition back
    against 1105 (M = 1024, N = 1536, r = 16, float32).
    """
    return product(low.T, dy.T).T.to(dtype).contiguous()


def gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    low: Tensor,
    scaling: float,
    dtype: torch.dtype,
    needed: Sequence[bool],
    input_gradient: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB of a base product with the update; one that is not needed is empty.

    dy B, of r columns, comes first: dx and dA are made from it, so that no product is larger than the base's own.

    Args:
        dy: (..., N). x: (..., K), or None where dA is not needed. low: s x A^T, (M, r).
        dtype: of the update's products. needed: which of the three.
        input_gradient: of rows of dy (M, N) and s dy B (M, r), the base's input gradient with s dy B A, (M, K).
    """
    dx, dA, dB = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    rows = as_rows(dy)
    wide = rows.to(dtype)
    if needed[0] or needed[1]:
        grad_low = project_back(wide, lora_B, scaling)  # (M, r)
    if needed[0]:
        dx = from_rows(input_gradient(rows, grad_low).to(dy.dtype), dy)
    if needed[1]:
        assert x is not None
        dA = grad_of_A(grad_low, as_rows(x), lora_A.dtype)
    if needed[2]:
        dB = grad_of_B(wide, low, lora_B.dtype)
    return dx, dA, dB


def empty_gradients(
    dy: Tensor, in_features: int, lora_A: Tensor, lora_B: Tensor, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the shapes and dtypes of `gradients`."""
    dx = dy.new_empty(*dy.shape[:-1], in_features) if needed[0] else dy.new_empty(0)
    dA, dB = (t.new_empty(t.shape if n else 0) for t, n in zip((lora_A, lora_B), needed[1:], strict=True))
    return dx, dA, dB


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b: in place where the dtypes agree, else in the wider of them."""
    return total.addmm_(a, b) if total.dtype == a.dtype else total + a @ b

"""The products of LoRA's update, which all have r columns on one side, each in the form that is fastest.

Where Triton runs, 16-bit rows are multiplied as they are by a kernel (`thin_triton.py`) that takes the dtypes and
strides of factor and result as they come, and scales. Elsewhere both are cast to one dtype, and torch multiplies.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import cast, dense_product
from ..dispatch import use_triton

MAX_RANK = 256
"""The most columns of a factor that the kernel is given: it reads the rows once for every 32 or 64 of them."""

# Dtypes of rows and of the product.
_TAKEN = {
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
}


def as_thin_takes(rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """Rows as the products below take them: as they are where the kernel does, else in `dtype`."""
    return rows if rows.dtype == dtype or _is_thin(rows, rank, dtype) else rows.to(dtype)


def project(rows: Tensor, lora_A: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """low = s x A^T in `dtype`: (M, K) and (r, K) -> (M, r)."""
    if _is_thin(rows, lora_A.shape[0], dtype):
        low = torch.empty(rows.shape[0], lora_A.shape[0], dtype=dtype, device=rows.device)
        _kernel().product(rows, lora_A.T, dtype, low, scaling)
        return low
    return dense_product(cast(rows, dtype), cast(lora_A, dtype), scaling)


def project_back(dy: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """g = s dy B in `dtype`: (M, N) and (N, r) -> (M, r)."""
    if _is_thin(dy, lora_B.shape[1], dtype):
        g = torch.empty(dy.shape[0], lora_B.shape[1], dtype=dtype, device=dy.device)
        _kernel().product(dy, lora_B, dtype, g, scaling)
        return g
    return dense_product(cast(dy, dtype), cast(lora_B, dtype).T, scaling)


def grad_of_A(grad_low: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """dA = g^T x in `dtype`: (M, r) and (M, K) -> (r, K)."""
    if _is_thin(rows, grad_low.shape[1], grad_low.dtype):
        dA = torch.empty(grad_low.shape[1], rows.shape[1], dtype=dtype, device=rows.device)
        _kernel().product(rows, grad_low, grad_low.dtype, dA.T, over_rows=True)
        return dA
    return cast(dense_product(grad_low.T, cast(rows, grad_low.dtype).T), dtype)


def grad_of_B(dy: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """dB = dy^T low in `dtype`: (M, N) and (M, r) -> (N, r).

    On a CPU made as its transpose, low^T dy, whose left factor is the small one: 408 microseconds with the
    transposition back against 1105 (M = 1024, N = 1536, r = 16, float32).
    """
    if _is_thin(dy, low.shape[1], low.dtype):
        dB = torch.empty(dy.shape[1], low.shape[1], dtype=dtype, device=dy.device)
        _kernel().product(dy, low, low.dtype, dB, over_rows=True)
        return dB
    dy = cast(dy, low.dtype)
    if low.is_cpu:
        return cast(dense_product(low.T, dy.T).T, dtype).contiguous()
    return cast(dense_product(dy.T, low.T), dtype)


def _is_thin(rows: Tensor, rank: int, dtype: torch.dtype) -> bool:
    """True if the kernel multiplies `rows` by a factor of `rank` columns, to the precision of `dtype`.

    Not float16 to the precision of float32: a float16 number has more bits than a bfloat16 one and less range than a
    float32 one, so that rows and parts of the factor would have no 16-bit dtype in common.
    """
    return (rows.dtype, dtype) in _TAKEN and 0 < rank <= MAX_RANK and rows.numel() > 0 and use_triton(rows)


@functools.cache
def _kernel() -> Any:
    from . import thin_triton  # where Triton may be missing

    return thin_triton

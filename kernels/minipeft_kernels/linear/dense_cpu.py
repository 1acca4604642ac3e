"""Products with a frozen dense weight in compiled code, where that is faster than torch's on a CPU.

A few rows of x, as when a model generates, read W once, four of its rows at a time, and LoRA's update is added in the
same call: `kernels/native/thin.h`. More rows, and the input gradient, of a bfloat16 W on a CPU without instructions for
it go through panels that are widened to float32 (`panels.h`): torch emulates such products, and a float32 copy of W
would be written and read at every call. What does not fit is answered with None.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .. import arithmetic, native
from .low_rank import Lora

# Rows of x up to which a product goes through W row by row; as in kernels/native/nf4.h.
THIN_ROWS = 4
# Weights from which the compiled code is taken: below, a call's time is its Python's, whoever multiplies.
LEAST = 1 << 15
_CALL = struct.Struct("15qd")
_DTYPES = (torch.float32, torch.bfloat16)


def thin_product(x: Tensor, weight: Tensor, dtype: torch.dtype, lora: Lora | None) -> Tensor | None:
    """x W^T + s (x A^T) B^T for up to THIN_ROWS rows of x, summed in float32; None where there is no such product.

    Args:
        x: (..., K) in weight's dtype. weight: (N, K). dtype: of the result, float32 or bfloat16; rounded to it once.
        lora: A (r, K) and B (N, r) in float32, and s.

    Returns:
        (..., N).
    """
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    if not 0 < rows <= THIN_ROWS or x.shape[-1] != k or x.dtype != weight.dtype or not _fits(x, weight, dtype):
        return None
    if lora is None:
        return _call(x, weight, dtype, rows, False)
    lora_A, lora_B, scaling = lora
    rank = lora_A.shape[0]
    if not is_matrix(lora_A, (rank, k)) or not is_matrix(lora_B, (n, rank)):
        return None
    return _call(x, weight, dtype, rows, False, (lora_A.data_ptr(), lora_B.data_ptr(), rank), scaling)


def product(a: Tensor, weight: Tensor, backward: bool) -> Tensor | None:
    """a W^T, or backward a W, in float32; None where torch's product is as fast, or none fits.

    Args:
        a: (M, K) or backward (M, N), in weight's dtype. weight: (N, K).

    Returns:
        (M, N) or backward (M, K).
    """
    thin = not backward and a.shape[0] <= THIN_ROWS
    emulated = weight.dtype not in arithmetic.CPU_DTYPES
    if not (thin or emulated) or not a.numel() or a.dtype != weight.dtype or not _fits(a, weight, torch.float32):
        return None
    if a.shape[1] != weight.shape[0 if backward else 1]:
        return None  # torch says what is wrong
    return _call(a if thin else a.float(), weight, torch.float32, a.shape[0], backward)


def is_matrix(t: Tensor, shape: tuple[int, int]) -> bool:
    """True of a factor as the compiled code reads it."""
    return t.dtype == torch.float32 and t.shape == shape and t.is_cpu and t.is_contiguous() and has_memory(t)


def has_memory(t: Tensor) -> bool:
    """False while a sharded model has freed the tensor's storage, which is then not needed."""
    return t.data_ptr() != 0 or t.numel() == 0


def _fits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    if weight.dtype not in _DTYPES or dtype not in _DTYPES or weight.numel() < LEAST or weight.shape[1] % 32:
        return False
    if type(weight) not in (Tensor, torch.nn.Parameter) or not weight.is_cpu or not weight.is_contiguous():
        return False
    if weight.requires_grad and torch.is_grad_enabled():  # it is not frozen after all: torch records the product
        return False
    return native.has_products() and has_memory(weight) and has_memory(x)


def _call(
    x: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    rows: int,
    backward: bool,
    update: tuple[int, int, int] = (0, 0, 0),
    scaling: float = 0.0,
) -> Tensor | None:
    """update: the addresses of A and B, and the rank."""
    x = x if x.is_contiguous() else x.contiguous()
    n, k = weight.shape
    out = torch.empty((*x.shape[:-1], k if backward else n), dtype=dtype)
    dtypes = native.DTYPES
    how = (weight.data_ptr(), n, k, dtypes[weight.dtype], native.threads(), native.level(), backward)
    call = (x.data_ptr(), out.data_ptr(), rows, dtypes[x.dtype], dtypes[dtype], *update, scaling)
    return out if native.library().minipeft_dense(_CALL.pack(*how, *call)) else None

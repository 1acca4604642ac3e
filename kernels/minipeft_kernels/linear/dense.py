"""Products with a frozen dense weight, and the update alone, which has none.

Autograd through `F.linear` and two small products would multiply by whatever `torch.mm` takes (see `dense_product`) and
keep the input once more, cast to the adapter's dtype. Where base and update have one dtype, the update is added where
the base product lies; a 16-bit base under a float32 adapter is added to it in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import arithmetic_dtype, cast, dense_product
from ..dispatch import runs_native
from . import dense_cpu
from .low_rank import LowRank


def forward(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, update: LowRank | None, compute_dtype: torch.dtype
) -> Tensor:
    """rows W^T + b + low up^T: (M, K) -> (M, N), in the dtype of the arithmetic or in the wider one of the update.

    Without W the result is low up^T alone. The product is in the dtype of rows, whatever `compute_dtype` is.
    """
    if weight is None:
        assert update is not None and bias is None
        low, up = update
        return dense_product(low, cast(up, low.dtype))
    y = _base_product(rows, weight, backward=False)
    if bias is not None:
        y.add_(cast(bias, y.dtype))
    if update is None:
        return y
    low, up = update
    return _add_product(y, low, cast(up, low.dtype).T)


def input_gradient(rows: Tensor, weight: Tensor | None, update: LowRank | None, compute_dtype: torch.dtype) -> Tensor:
    """rows W + low up: (M, N) -> (M, K), likewise."""
    if weight is None:
        assert update is not None
        low, up = update
        return dense_product(low, cast(up, low.dtype).T)
    dx = _base_product(rows, weight, backward=True)
    if update is None:
        return dx
    low, up = update
    return _add_product(dx, low, cast(up, low.dtype))


def _base_product(rows: Tensor, weight: Tensor, backward: bool) -> Tensor:
    """rows W^T or backward rows W, computed and given in the dtype of the arithmetic."""
    dtype = arithmetic_dtype(rows.dtype, rows.device)
    y = dense_cpu.product(rows, weight, backward) if runs_native(rows) else None
    if y is not None:
        return cast(y, dtype)
    return dense_product(cast(rows, dtype), cast(weight.T if backward else weight, dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b: in place where the dtypes agree, else in the wider of them."""
    return total.addmm_(a, b) if total.dtype == a.dtype else total + a @ b

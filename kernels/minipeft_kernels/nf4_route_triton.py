"""Which form a product with a packed NF4 weight takes on a GPU: fused, or decoded once and multiplied by the vendor.

With few rows a product is bound by the weight's bytes, and reading a quarter of them wins: one fused kernel. With many
it is bound by arithmetic, decoding it again for every tile costs more than writing it out once, and the vendor's
product is the better one. `nf4_matmul_configs` has the number of rows where that turns.
"""

import torch
from torch import Tensor

from .dispatch import capability
from .nf4_dequantize_triton import dequantize_into
from .nf4_matmul import Packed, Sizes
from .nf4_matmul_configs import fused_max_rows
from .nf4_matmul_triton import LowRank, fused_obstacle, nf4_matmul_forward, nf4_matmul_input_grad


def multiply(
    rows: Tensor, packed: Packed, sizes: Sizes, bias: Tensor | None = None, lora: LowRank | None = None
) -> Tensor:
    """rows W^T + bias + low up^T: (M, K) -> (M, N) in the dtype of rows; `lora` is (low (M, r), up (N, r))."""
    if is_fused(rows, sizes):
        return nf4_matmul_forward(rows, *packed, *sizes[:3], bias=bias, lora=lora)
    w = _dense(packed, sizes, rows.dtype)
    y = rows @ w.t() if bias is None else torch.addmm(bias.to(rows.dtype), rows, w.t())
    if lora is not None:
        low, up = lora
        y.addmm_(low.to(y.dtype), up.to(y.dtype).t())
    return y


def multiply_back(rows: Tensor, packed: Packed, sizes: Sizes, lora: LowRank | None = None) -> Tensor:
    """rows W + low up: (M, N) -> (M, K) in the dtype of rows; `lora` is (low (M, r), up (r, K))."""
    if is_fused(rows, sizes):
        return nf4_matmul_input_grad(rows, *packed, *sizes[:3], lora=lora)
    dx = rows @ _dense(packed, sizes, rows.dtype)
    if lora is not None:
        low, up = lora
        dx.addmm_(low.to(dx.dtype), up.to(dx.dtype))
    return dx


def is_fused(rows: Tensor, sizes: Sizes) -> bool:
    """Whether a product of these rows runs as one kernel; otherwise the weight is decoded first."""
    _, in_features, blocksize, nested_blocksize = sizes
    if fused_obstacle(rows.dtype, in_features, blocksize, nested_blocksize):
        return False
    limit = fused_max_rows(capability(rows.device), rows.dtype == torch.float32)
    return limit is None or rows.shape[0] <= limit


def _dense(packed: Packed, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """W decoded whole, (N, K). The caching allocator gives every layer the same memory for it, one after the other."""
    out = torch.empty(sizes[0], sizes[1], dtype=dtype, device=packed[0].device)
    return dequantize_into(out, *packed, *sizes[2:])

"""y = x W^T + b with W in NF4, and its input gradient dx = dy W (Dettmers et al. 2023, equation 5).

W is decoded a few rows at a time, so the float matrix never exists whole, forward or backward. Only the packed weight
is kept between the two; W is frozen, so x is not needed again.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import arithmetic_dtype
from .nf4_dequantize import decode_into, dequantize_absmax, level_pairs
from .nf4_quantize import WEIGHT_DTYPES

# codes, absmax, quant_map, nested_absmax, nested_map, offset: the tensors that an NF4 weight is.
Packed = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]

# Weights decoded at a time, as whole rows of W. 4096x4096 float32, M = 16, forward on one thread: 15.3 ms at 2^17,
# 13.0 at 2^19, 12.9 at 2^20, 14.6 at 2^21, and 41 with W decoded whole; with M = 256 it is 98 at 2^20 and 122 whole.
CHUNK = 1 << 20


def nf4_matmul(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    blocksize: int,
    nested_blocksize: int = 256,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + b, differentiable in x and b.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        codes: uint8 ((out_features * in_features + 1)//2, 1).
        absmax: float32 (blocks,), or uint8 when doubly quantized, with the three tensors below.
        quant_map: float32 (16,).
        nested_absmax, nested_map, offset: as `dequantize_absmax` takes them, or all None.
        out_features, in_features: rows and columns of W.
        blocksize, nested_blocksize: weights that share a scale, scales that share a nested scale.
        bias: (out_features,) or None.
        compute_dtype: of the product; None for x's. On a CPU that lacks it, float32 (see `arithmetic_dtype`).

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        TypeError: another dtype. ValueError: x has not in_features columns.
    """
    if x.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}: convert it, for example with .float()")
    if x.shape[-1] != in_features:
        raise ValueError(f"x's last dimension ({x.shape[-1]}) must be in_features ({in_features})")
    arithmetic = arithmetic_dtype(compute_dtype or x.dtype, x.device)
    packed = (codes, absmax, quant_map, nested_absmax, nested_map, offset)
    out: Tensor = _NF4Matmul.apply(x, bias, *packed, out_features, blocksize, nested_blocksize, arithmetic)
    return out


class _NF4Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        absmax: Tensor,
        quant_map: Tensor,
        nested_absmax: Tensor | None,
        nested_map: Tensor | None,
        offset: Tensor | None,
        out_features: int,
        blocksize: int,
        nested_blocksize: int,
        arithmetic: torch.dtype,
    ) -> Tensor:
        packed = (codes, absmax, quant_map, nested_absmax, nested_map, offset)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*packed)
        ctx.sizes = (out_features, x.shape[-1], blocksize, nested_blocksize)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype, arithmetic)

        m = x.shape[:-1].numel()
        with without_autocast(x.device.type):
            rows = x.reshape(m, x.shape[-1]).to(arithmetic)  # (..., K) -> (M, K)
            y = rows.new_zeros(m, out_features)
            for start, stop, w in decoded_rows(packed, ctx.sizes, arithmetic):
                torch.mm(rows, w.t(), out=y[:, start:stop])
            if bias is not None:
                y += bias.to(arithmetic)
        return y.view(*x.shape[:-1], out_features).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_dtype, bias_dtype, arithmetic = ctx.dtypes
        out_features, in_features = ctx.sizes[:2]
        m = grad.shape[:-1].numel()
        dy = grad.reshape(m, out_features)  # (..., N) -> (M, N)
        dx = db = None
        if ctx.needs_input_grad[0]:
            # The sum over rows of W is cut into chunks: add the chunks up in float32.
            total = dy.new_zeros(m, in_features, dtype=torch.float32)
            with without_autocast(grad.device.type):
                cast = dy.to(arithmetic)
                for start, stop, w in decoded_rows(ctx.saved_tensors, ctx.sizes, arithmetic):
                    if arithmetic == torch.float32:
                        total.addmm_(cast[:, start:stop], w)
                    else:
                        total += cast[:, start:stop] @ w
            dx = total.to(x_dtype).view(*grad.shape[:-1], in_features)
        if ctx.needs_input_grad[1]:
            db = dy.sum(0, dtype=torch.float32).to(bias_dtype)
        return dx, db, *(None,) * 10


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """The arithmetic's dtype is chosen already; device meta has no autocast to switch off."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def decoded_rows(
    packed: Packed, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first row, last row + 1, those rows of W in `dtype`), a chunk at a time in buffers used again."""
    codes, absmax, quant_map, nested_absmax, nested_map, offset = packed
    out_features, in_features, blocksize, nested_blocksize = sizes
    if nested_absmax is not None:
        assert nested_map is not None and offset is not None
        absmax = dequantize_absmax(absmax, nested_absmax, nested_map, offset, nested_blocksize)
    if out_features * in_features == 0:
        return
    flat = codes.view(-1)
    pairs = level_pairs(quant_map)
    step = max(1, CHUNK // in_features)
    # Rows need not start or end where a block does: up to two more blocks are decoded, and the rows cut out.
    size = min(2 * flat.numel(), step * in_features + 2 * blocksize)
    buffer = torch.empty(size, dtype=torch.float32, device=codes.device)
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    cast = None if dtype == torch.float32 else torch.empty(step * in_features, dtype=dtype, device=codes.device)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        first = start * in_features // blocksize * blocksize
        last = -(-stop * in_features // blocksize) * blocksize
        part = flat[first // 2 : last // 2]
        w = decode_into(buffer[: 2 * part.numel()], part, absmax[first // blocksize :], pairs, blocksize, index)[
            start * in_features - first : stop * in_features - first
        ]
        if cast is not None:
            w = cast[: w.numel()].copy_(w)
        yield start, stop, w.view(-1, in_features)

"""The low-rank update of LoRA: s (x A^T) B^T, with a backward that keeps no copy of its input.

Autograd through two `F.linear` calls would keep, for every layer, the input cast to the adapter's float32: over a
16-bit model that doubles the activations. Here x is saved as it came (the layer's own input, which autograd holds
once for all the projections that read it) and cast again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s (x A^T) B^T (Hu et al. 2021, equation 3, without the base product).

    Args:
        x: (..., in_features), floating point.
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: s.

    Returns:
        (..., out_features), in autocast's dtype under autocast, else in the wider of x's and lora_A's.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(x.dtype, lora_A.dtype)
    return _LoraUpdate.apply(x, lora_A, lora_B, scaling, dtype)


class _LoraUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            low = (x.to(dtype) @ lora_A.to(dtype).T).mul_(scaling)  # (..., r)
            ctx.save_for_backward(x, lora_A, lora_B, low)
            ctx.scaling, ctx.dtype = scaling, dtype
            return low @ lora_B.to(dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, low = ctx.saved_tensors
        grad_x = grad_A = grad_B = None
        grad = grad.to(ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_low = (grad @ lora_B.to(ctx.dtype)).mul_(ctx.scaling)  # (..., r)
            if ctx.needs_input_grad[0]:
                grad_x = (grad_low @ lora_A.to(ctx.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_A = (_rows(grad_low).T @ _rows(x.to(ctx.dtype))).to(lora_A.dtype)
            if ctx.needs_input_grad[2]:
                grad_B = (_rows(grad).T @ _rows(low)).to(lora_B.dtype)
        return grad_x, grad_A, grad_B, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])  # (..., n) -> (rows, n)

"""LoRA's products: the low-rank update s (x A^T) B^T, and a layer with a packed base and the update in one operation.

Autograd through two `F.linear` calls would keep, for every layer, the input cast to the adapter's float32: over a
16-bit model that doubles the activations. Here x is saved as it came (the layer's own input, which autograd holds
once for all the projections that read it) and cast again in the backward. Beside it, x A^T alone is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import nf4_native
from .arithmetic import arithmetic_dtype
from .dense import product
from .dispatch import runs_native, use_triton
from .lora_products import adapter_dtype, empty_gradients, grad_of_A, grad_of_B, gradients, project, project_back
from .nf4_matmul import (
    PACKED_SCHEMA,
    SIZES_SCHEMA,
    Packed,
    Sizes,
    as_rows,
    bias_gradient,
    cast,
    check_input,
    from_rows,
    multiply,
    multiply_back,
)
from .registration import below_autograd, computes_only, define_op, forward_mode, without_autocast


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
    return _LoraUpdate.apply(x, lora_A, lora_B, scaling, adapter_dtype(x, lora_A))


def lora_matmul(
    x: Tensor,
    packed: Packed,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    out_features: int,
    in_features: int,
    blocksize: int,
    nested_blocksize: int = 256,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + s (x A^T) B^T + b with W in NF4 (Dettmers et al. 2023, equation 5): differentiable in x, A, B and b.

    x is read once for both products, the update is added where the base product is summed, and the sum is rounded
    once. For x alike in both: where dropout acts on the update's x, that is not so.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        packed, out_features, in_features, blocksize, nested_blocksize, bias, compute_dtype: as `nf4_matmul`'s.
        lora_A: (r, in_features). lora_B: (out_features, r). x A^T is in autocast's dtype under autocast, else in the
            wider of x's and lora_A's; on a CPU that lacks it, in float32.
        scaling: s.

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        TypeError: another dtype. ValueError: x has not in_features columns.
    """
    check_input(x, in_features)
    sizes = (out_features, in_features, blocksize, nested_blocksize)
    alone = computes_only(x, lora_A, lora_B, bias) and not forward_mode()
    if alone and compute_dtype in (None, x.dtype) and runs_native(x):
        y = _few_rows(x, packed, lora_A, lora_B, scaling, sizes, bias)
        if y is not None:
            return y
    dtypes = (compute_dtype or x.dtype, arithmetic_dtype(adapter_dtype(x, lora_A), x.device))
    call = _run_lora_matmul if alone else _lora_matmul_op
    out: Tensor = call(x, lora_A, lora_B, bias, scaling, *packed, *sizes, *dtypes)[0]
    return out


def _few_rows(
    x: Tensor, packed: Packed, lora_A: Tensor, lora_B: Tensor, scaling: float, sizes: Sizes, bias: Tensor | None
) -> Tensor | None:
    """`lora_matmul` of a few rows in one call of the compiled code, or None where that does not have it."""
    if torch._C._is_any_autocast_enabled():
        return None
    if bias is None:
        return nf4_native.adapted_product(x, packed, sizes, x.dtype, lora_A, lora_B, scaling)
    y = nf4_native.adapted_product(x, packed, sizes, torch.float32, lora_A, lora_B, scaling)
    return None if y is None else y.add_(bias).to(x.dtype)


class _LoraUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            low = project(as_rows(x), lora_A, scaling, dtype)  # (M, r)
            ctx.save_for_backward(x, lora_A, lora_B, low)
            ctx.scaling, ctx.dtype = scaling, dtype
            return from_rows(product(low, lora_B.to(dtype)), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, low = ctx.saved_tensors
        grad_x = grad_A = grad_B = None
        rows = as_rows(grad).to(ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_low = project_back(rows, lora_B, ctx.scaling)
            if ctx.needs_input_grad[0]:
                grad_x = from_rows(product(grad_low, lora_A.to(ctx.dtype).T), x).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_A = grad_of_A(grad_low, as_rows(x), lora_A.dtype)
            if ctx.needs_input_grad[2]:
                grad_B = grad_of_B(rows, low, lora_B.dtype)
        return grad_x, grad_A, grad_B, None, None


class _LoraMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, *args: Any
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            y, low = _lora_matmul_op(x, lora_A, lora_B, bias, scaling, *args)
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)
        kept = x if ctx.needs_input_grad[1] else None  # dA alone is made from x
        ctx.save_for_backward(kept, lora_A, lora_B, low, *args[:6])
        ctx.scaling, ctx.rest = scaling, args[6:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, low

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 17
        x, lora_A, lora_B, low, *packed = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grads = _lora_matmul_backward_op(dy, x, lora_A, lora_B, low, ctx.scaling, *packed, *ctx.rest, list(needed))
        db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return (*(g if n else None for g, n in zip(grads, needed, strict=True)), db, *(None,) * 13)


def _run_lora_matmul(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, scaling: float, *args: Any
) -> tuple[Tensor, Tensor]:
    packed, sizes, (compute_dtype, dtype) = args[:6], args[6:10], args[10:12]
    rows = as_rows(x)
    with without_autocast():
        low = project(rows, lora_A, scaling, dtype)  # (M, r)
        if use_triton(x):
            from .nf4_route_triton import multiply as multiply_triton

            y = multiply_triton(rows.to(compute_dtype), packed, sizes, bias, (low, lora_B))
        else:
            # In low's dtype, so that the update is added where the base product is, before it is rounded.
            y = multiply(cast(rows, arithmetic_dtype(compute_dtype, x.device)), packed, sizes, dtype)
            y.addmm_(low, lora_B.to(dtype).T)
            if bias is not None:
                y += bias.to(y.dtype)
    return from_rows(y, x).to(x.dtype), low


def _run_lora_matmul_backward(
    dy: Tensor, x: Tensor | None, lora_A: Tensor, lora_B: Tensor, low: Tensor, scaling: float, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB; one that is not needed is empty."""
    packed, sizes, (compute_dtype, dtype), needed = args[:6], args[6:10], args[10:12], args[12]

    def input_gradient(rows: Tensor, grad_low: Tensor) -> Tensor:
        return _input_gradient(rows, grad_low, lora_A, packed, sizes, compute_dtype)

    with without_autocast():
        return gradients(dy, x, lora_A, lora_B, low, scaling, dtype, needed, input_gradient)


def _input_gradient(
    rows: Tensor, grad_low: Tensor, lora_A: Tensor, packed: Packed, sizes: Sizes, compute_dtype: torch.dtype
) -> Tensor:
    """rows W + grad_low A: (M, N) and (M, r) -> (M, K)."""
    if use_triton(rows):
        from .nf4_route_triton import multiply_back as multiply_back_triton

        return multiply_back_triton(rows.to(compute_dtype), packed, sizes, (grad_low, lora_A))
    a = cast(rows, arithmetic_dtype(compute_dtype, rows.device))
    dx = multiply_back(a, packed, sizes, grad_low.dtype)
    return dx.addmm_(grad_low, lora_A.to(grad_low.dtype))


def _fake_lora_matmul(x: Tensor, lora_A: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    rows, out_features, dtype = x.shape[:-1].numel(), args[9], args[14]
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(rows, lora_A.shape[0], dtype=dtype)


def _fake_lora_matmul_backward(
    dy: Tensor, x: Tensor | None, lora_A: Tensor, lora_B: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(dy, args[9], lora_A, lora_B, needed=args[14])


_DTYPES_SCHEMA = "ScalarType compute_dtype, ScalarType adapter_dtype"

_lora_matmul_op = define_op(
    f"lora_matmul(Tensor x, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, {PACKED_SCHEMA}, "
    f"{SIZES_SCHEMA}, {_DTYPES_SCHEMA}) -> (Tensor y, Tensor low)",
    _run_lora_matmul,
    fake=_fake_lora_matmul,
    autograd=_LoraMatmul,
)
_lora_matmul_backward_op = define_op(
    f"lora_matmul_backward(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor low, float scaling, "
    f"{PACKED_SCHEMA}, {SIZES_SCHEMA}, {_DTYPES_SCHEMA}, bool[3] needed) -> (Tensor dx, Tensor dA, Tensor dB)",
    _run_lora_matmul_backward,
    fake=_fake_lora_matmul_backward,
)

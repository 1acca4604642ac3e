"""Products with a frozen dense weight: x W^T + b alone, and with LoRA's update s (x A^T) B^T in one operation.

Autograd through `F.linear` and two small products would write the update and the sum to memory apart, forward and
backward, and multiply by whatever `torch.mm` takes (see `dense.py`). Here the update is added where the base product
lies. W is frozen, so of x nothing is kept unless dA needs it; beside it x A^T alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import arithmetic_dtype, as_autocast
from .dense import product
from .lora_products import adapter_dtype, add_product, empty_gradients, gradients, project
from .nf4_matmul import as_rows, bias_gradient, from_rows
from .registration import below_autograd, computes_only, define_op, without_autocast


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as `F.linear`, differentiable in x and b; W (out_features, in_features) may be a transposed view.

    On a CPU without instructions for the dtype of x the product is in float32 (see `arithmetic_dtype`).

    Returns:
        (..., out_features) in x's dtype, or under autocast in autocast's.
    """
    call = _run_frozen_linear if computes_only(x, bias) else _frozen_linear_op
    out: Tensor = call(as_autocast(x), weight, bias)
    return out


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """x W^T + s (x A^T) B^T + b with W frozen: differentiable in x, A, B and b.

    Args:
        x: (..., in_features), floating point; the base product is in this dtype, or under autocast in autocast's.
        weight: (out_features, in_features), perhaps a transposed view. bias: (out_features,) or None.
        lora_A: (r, in_features). lora_B: (out_features, r). x A^T is in autocast's dtype under autocast, else in the
            wider of x's and lora_A's.
        scaling: s.

    Returns:
        (..., out_features) in the base product's dtype.
    """
    dtype = arithmetic_dtype(adapter_dtype(x, lora_A), x.device)
    call = _run_lora_linear if computes_only(x, bias, lora_A, lora_B) else _lora_linear_op
    out: Tensor = call(as_autocast(x), weight, bias, lora_A, lora_B, scaling, dtype)[0]
    return out


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with below_autograd():
            y: Tensor = _frozen_linear_op(x, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # dy W is the same operation with W transposed.
        dx = _frozen_linear_op(dy, ctx.saved_tensors[0].T, None) if ctx.needs_input_grad[0] else None
        return dx, None, bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
        lora_A, lora_B, scaling, dtype = args
        with below_autograd():
            y, low = _lora_linear_op(x, weight, bias, *args)
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)
        kept = x if ctx.needs_input_grad[3] else None  # dA alone is made from x
        ctx.save_for_backward(kept, weight, lora_A, lora_B, low)
        ctx.scaling, ctx.dtype = scaling, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, low

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, weight, lora_A, lora_B, low = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        grads = _lora_linear_backward_op(dy, x, weight, lora_A, lora_B, low, ctx.scaling, ctx.dtype, needed)
        dx, dA, dB = (g if n else None for g, n in zip(grads, needed, strict=True))
        db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, db, dA, dB, None, None


def _run_frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast():
        y = _base_product(as_rows(x), weight, bias)
    return from_rows(y.to(x.dtype), x)


def _base_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) and (N, K) -> (M, N), computed and given in the dtype of the arithmetic."""
    dtype = arithmetic_dtype(rows.dtype, rows.device)
    y = product(rows.to(dtype), weight.to(dtype))
    return y if bias is None else y.add_(bias.to(dtype))


def _run_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows = as_rows(x)
    with without_autocast():
        low = project(rows, lora_A, scaling, dtype)
        y = add_product(_base_product(rows, weight, bias), low, lora_B.to(dtype).T)
    return from_rows(y.to(x.dtype), x), low


def _run_lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    low: Tensor,
    scaling: float,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB; one that is not needed is empty."""

    def input_gradient(rows: Tensor, grad_low: Tensor) -> Tensor:
        return add_product(_base_product(rows, weight.T, None), grad_low, lora_A.to(dtype))

    with without_autocast():
        return gradients(dy, x, lora_A, lora_B, low, scaling, dtype, needed, input_gradient)


def _fake_lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, *args: Any) -> Any:
    rows, dtype = x.shape[:-1].numel(), args[-1]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, lora_A.shape[0], dtype=dtype)


def _fake_lora_linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *args: Any
) -> Any:
    return empty_gradients(dy, weight.shape[1], lora_A, lora_B, needed=args[-1])


_frozen_linear_op = define_op(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _run_frozen_linear,
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    autograd=_FrozenLinear,
)
_lora_linear_op = define_op(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, "
    "ScalarType adapter_dtype) -> (Tensor y, Tensor low)",
    _run_lora_linear,
    fake=_fake_lora_linear,
    autograd=_LoraLinear,
)
_lora_linear_backward_op = define_op(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor low, "
    "float scaling, ScalarType adapter_dtype, bool[3] needed) -> (Tensor dx, Tensor dA, Tensor dB)",
    _run_lora_linear_backward,
    fake=_fake_lora_linear_backward,
)

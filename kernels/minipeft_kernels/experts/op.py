"""y_i = W_e x_i + s B_e (A_e x_i) for a row x_i that was sent to expert e: the linear layers of all experts at once.

Rows are sorted by expert, `offsets` says where each expert's end, and every product is one expert's rows by one
expert's matrix (Shazeer et al. 2017, section 2; Hu et al. 2021, equation 3):

    x      [ rows of expert 0 | of 1 | .. | of E-1 | rows of nobody ]      (S, K)
    offsets        2            2    ..    S'                               int32 (E,): expert 1 has no rows here

    low_e = s x_e A_e^T            (rows of e, r), kept for the backward beside x
    y_e   = x_e W_e^T + low_e B_e^T

    g_e   = s dy_e B_e             dx_e = dy_e W_e + g_e A_e        dA_e = g_e^T x_e        dB_e = dy_e^T low_e

The update is split: W_e + s B_e A_e is never formed, for which every expert's would be made, whichever was chosen; the
largest tensors here grow with the rows. W is frozen, dense or NF4. An expert without rows is not read.

`experts_reference` is what a reader learns from, and the tests hold everything else against it. `loop` computes it an
expert at a time by the forms of `linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arithmetic import arithmetic_dtype, as_autocast
from ..dispatch import use_triton
from ..linear.low_rank import Lora, update_dtype
from ..linear.op import Numbers, linear
from ..nf4.dequantize import nf4_dequantize_reference
from ..packed import SCHEMA, TENSORS
from ..registration import below_autograd, define_op, is_plain_call, is_transformed, without_autocast
from . import loop
from .checks import check_backward, check_forward, check_sizes
from .stack import NF4Stack, Stack, flatten_stack, unflatten_stack


def experts_reference(x: Tensor, offsets: Tensor, weight: Stack, lora: Lora | None = None) -> Tensor:
    """`experts_linear` in the plainest PyTorch, differentiable: all in one dtype, x's.

    Args and returns: as `experts_linear`'s.
    """
    y = x.new_zeros(x.shape[0], weight.rows if isinstance(weight, NF4Stack) else weight.shape[1])
    for e, start, stop in loop.groups(offsets):
        w = nf4_dequantize_reference(weight.expert(e), x.dtype) if isinstance(weight, NF4Stack) else weight[e]
        rows = x[start:stop]
        out = rows @ w.T
        if lora is not None:
            lora_A, lora_B, scaling = lora
            out = out + scaling * (rows @ lora_A[e].T) @ lora_B[e].T
        y = y.index_put((torch.arange(start, stop, device=x.device),), out)
    return y


def experts_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Stack | None,
    lora: Lora | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x_i W_e^T + s (x_i A_e^T) B_e^T of each row i of expert e, differentiable in x, A and B.

    Args:
        x: (S, in_features), floating point, sorted by expert; float32, bfloat16 or float16 for NF4 weights. Under
            autocast it is taken in autocast's dtype.
        offsets: int32 (experts,), on x's device, not decreasing: expert e has the rows from offsets[e-1] (0 for the
            first) up to offsets[e]. Rows from offsets[-1] on belong to nobody.
        weight: (experts, out_features, in_features), frozen: dense, of x's dtype and perhaps a transposed view, or an
            `NF4Stack`. None for the update alone, as where dropout acts on its x.
        lora: A (experts, r, in_features), B (experts, out_features, r), any views, and s; or None. The arithmetic of
            the update is as `linear`'s.
        compute_dtype: of the product with NF4 weights; None for x's. On a CPU that lacks it, float32.

    Returns:
        (S, out_features) in x's dtype, or under autocast in autocast's; of the update alone, in the dtype of x A^T.
        Zeros in the rows of nobody.

    Raises:
        TypeError: an x of another dtype for NF4 weights, or offsets that are not int32. ValueError: sizes that do not
            fit each other.
    """
    lora_A, lora_B, scaling = lora or (None, None, 0.0)
    if weight is not None:
        x = as_autocast(x)
    check_sizes(x, offsets, weight, lora_A, lora_B)
    dtype = x.dtype if lora_A is None else update_dtype(x, lora_A)
    if weight is not None:
        dtype = arithmetic_dtype(dtype, x.device)
    numbers = (scaling, compute_dtype or x.dtype, dtype)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, lora_A, lora_B))
    out: Tensor
    if is_transformed():
        out = _differentiable(x, offsets, weight, lora, compute_dtype)
    elif not is_plain_call(x):
        out, _ = _experts_op(x, offsets, lora_A, lora_B, *numbers, *flatten_stack(weight))
    elif recorded:
        out, _ = _Experts.apply(x, offsets, lora_A, lora_B, numbers, weight)
    else:
        out, _ = _run(x, offsets, lora_A, lora_B, *numbers, weight)
    return out


def _differentiable(
    x: Tensor, offsets: Tensor, weight: Stack | None, lora: Lora | None, compute_dtype: torch.dtype | None
) -> Tensor:
    """`experts_linear`, one expert after the other by `linear`, which has derivatives of every kind."""
    parts, done = [], 0
    for e, start, done in loop.groups(offsets):
        own = None if lora is None else (lora[0][e], lora[1][e], lora[2])
        w = weight.expert(e) if isinstance(weight, NF4Stack) else None if weight is None else weight[e]
        parts.append(linear(x[start:done], w, None, own, compute_dtype))
    if not parts:
        like = weight if lora is None else lora[1]
        assert like is not None
        columns = like.rows if isinstance(like, NF4Stack) else like.shape[1]
        return x.new_zeros(x.shape[0], columns)
    return torch.cat([*parts, parts[0].new_zeros(x.shape[0] - done, parts[0].shape[1])])


class _Experts(torch.autograd.Function):
    """The operation with its backward. W is frozen and has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offsets: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        numbers: Numbers,
        weight: Stack | None,
    ) -> tuple[Tensor, Tensor]:
        if is_plain_call(x):
            y, low = _run(x, offsets, lora_A, lora_B, *numbers, weight)
        else:
            with below_autograd():
                y, low = _experts_op(x, offsets, lora_A, lora_B, *numbers, *flatten_stack(weight))
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)
        needs_x, _, needs_A, *_ = ctx.needs_input_grad
        kept: tuple[Tensor | None, ...] = (None, None, None, None)
        if lora_A is not None:
            kept = (x if needs_A else None, lora_A, lora_B, low)
        flat = flatten_stack(weight if needs_x else None)
        ctx.save_for_backward(offsets, *kept, *flat[:TENSORS])
        ctx.numbers, ctx.sizes, ctx.dtype = numbers, flat[TENSORS:], x.dtype
        return y, low

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """The gradients of x, A and B, of those that need one."""
        needs_x, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        if dy is None or not (needs_x or needs_A or needs_B):
            return None, None, None, None, None, None
        offsets, x, lora_A, lora_B, low, *weight = ctx.saved_tensors
        arguments: Any = (dy, offsets, x, lora_A, lora_B, low, *ctx.numbers, [needs_x, needs_A, needs_B])
        flat = (*weight, *ctx.sizes)
        if torch.is_grad_enabled():  # a gradient that is differentiated
            dx, dA, dB = loop.run_backward_twice(*arguments, *flat)
        else:
            call = _run_backward_op if is_plain_call(dy) else _experts_backward_op
            dx, dA, dB = call(*arguments, *flat)
        return dx.to(ctx.dtype) if needs_x else None, None, dA if needs_A else None, dB if needs_B else None, None, None


def _run(
    x: Tensor,
    offsets: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    weight: Stack | None,
) -> tuple[Tensor, Tensor]:
    """y (S, N), and low (S, r), which is empty without an update."""
    with without_autocast():
        return _form_for(x).forward(x, offsets, lora_A, lora_B, scaling, compute_dtype, adapter_dtype, weight)


def _form_for(rows: Tensor) -> Any:
    """The module that computes it on the device of `rows`: `gpu` or `loop`."""
    if use_triton(rows):
        from . import gpu

        return gpu
    return loop


def _run_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, offsets, lora_A, lora_B, scaling, compute_dtype, dtype, *weight = arguments
    return _run(x, offsets, lora_A, lora_B, scaling, compute_dtype, dtype, unflatten_stack(weight))


def _run_backward_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dx (S, K) in dy's dtype, dA and dB; one that is not needed is empty."""
    dy, offsets, x, lora_A, lora_B, low, scaling, compute_dtype, dtype, needed, *weight = arguments
    with without_autocast():
        return _form_for(dy).backward(
            dy, offsets, x, lora_A, lora_B, low, scaling, compute_dtype, dtype, needed, unflatten_stack(weight)
        )


def _recorded(
    x: Tensor, offsets: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The operation under autograd."""
    check_forward(x, offsets, lora_A, lora_B, *rest)
    scaling, compute_dtype, dtype, *flat_weight = rest
    weight = unflatten_stack(flat_weight)
    outputs: tuple[Tensor, Tensor] = _Experts.apply(x, offsets, lora_A, lora_B, (scaling, compute_dtype, dtype), weight)
    return outputs


def _fake(
    x: Tensor, offsets: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, _, dtype, *flat_weight = rest
    weight = unflatten_stack(flat_weight)
    if weight is None:
        assert lora_B is not None
        y = x.new_empty(x.shape[0], lora_B.shape[1], dtype=dtype)
    else:
        y = x.new_empty(x.shape[0], weight.rows if isinstance(weight, NF4Stack) else weight.shape[1])
    return y, x.new_empty(0) if lora_A is None else x.new_empty(x.shape[0], lora_A.shape[1], dtype=dtype)


def _fake_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    low: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, (needs_x, needs_A, needs_B), *flat_weight = rest
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if needs_x:
        weight = unflatten_stack(flat_weight)
        like = lora_A if weight is None else weight
        assert like is not None
        dx = dy.new_empty(dy.shape[0], like.columns if isinstance(like, NF4Stack) else like.shape[2])
    if needs_A and lora_A is not None:
        dA = torch.empty_like(lora_A)
    if needs_B and lora_B is not None:
        dB = torch.empty_like(lora_B)
    return dx, dA, dB


_NUMBERS = "float scaling, ScalarType compute_dtype, ScalarType adapter_dtype"

_experts_op = define_op(
    f"experts_linear(Tensor x, Tensor offsets, Tensor? lora_A, Tensor? lora_B, {_NUMBERS}, {SCHEMA}) -> "
    "(Tensor y, Tensor low)",
    _run_op,
    fake=_fake,
    autograd=_recorded,
    check=check_forward,
)
_experts_backward_op = define_op(
    f"experts_linear_backward(Tensor dy, Tensor offsets, Tensor? x, Tensor? lora_A, Tensor? lora_B, Tensor? low, "
    f"{_NUMBERS}, bool[3] needed, {SCHEMA}) -> (Tensor dx, Tensor dA, Tensor dB)",
    _run_backward_op,
    fake=_fake_backward,
    check=check_backward,
)

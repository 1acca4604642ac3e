"""y = x W^T + b + s (x A^T) B^T, W frozen: dense or NF4, with LoRA's update or without (Hu et al. 2021, equation 3).

    low = s x A^T            (M, r), kept for the backward beside x
    y   = x W^T + low B^T + b

    g   = s dy B             (M, r), so that no product is larger than the base's own
    dx  = dy W + g A         dA = g^T x         dB = dy^T low         db = the sum of dy's rows

W is frozen, so x is kept for dA alone, as it came: autograd's own graph would keep it once more, cast to the adapter's
float32. Base and update are one sum, rounded once. Without W (None) the operation is the update alone.

`linear_reference` is what a reader learns from, and the tests hold everything else against it. The same sums are
computed by `dense` (a dense W), `cpu` (NF4 on a CPU) and `gpu` (NF4 in Triton kernels): each has a `forward` and an
`input_gradient`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arithmetic import arithmetic_dtype, as_autocast, cast
from ..dispatch import runs_native, use_triton
from ..nf4.checks import WEIGHT_DTYPES
from ..nf4.dequantize import nf4_dequantize, nf4_dequantize_reference
from ..packed import NF4, SCHEMA, TENSORS, Weight, flatten, unflatten
from ..registration import below_autograd, define_op, is_plain_call, is_transformed, without_autocast
from . import cpu, dense, twice
from .checks import check_backward, check_forward
from .low_rank import Lora, LowRank, update_dtype
from .rows import as_rows, from_rows
from .thin import as_thin_takes, grad_of_A, grad_of_B, project, project_back

Numbers = tuple[float, torch.dtype, torch.dtype]
"""s, the dtype of a product with NF4, and the dtype of x A^T."""


def linear_reference(x: Tensor, weight: Weight, bias: Tensor | None = None, lora: Lora | None = None) -> Tensor:
    """`linear` in the plainest PyTorch, with W decoded whole, differentiable: all in one dtype, x's.

    Args and returns: as `linear`'s.
    """
    w = nf4_dequantize_reference(weight, x.dtype) if isinstance(weight, NF4) else weight
    y = x @ w.T
    if lora is not None:
        lora_A, lora_B, scaling = lora
        y = y + scaling * (x @ lora_A.T) @ lora_B.T
    return y if bias is None else y + bias


def linear(
    x: Tensor,
    weight: Weight | None,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + b + s (x A^T) B^T, differentiable in x, b, A and B.

    Under torch.func's transforms (grad, vmap, jvp) and forward-mode derivatives it is PyTorch's own operations, with
    an NF4 weight decoded whole.

    Args:
        x: (..., in_features), floating point; float32, bfloat16 or float16 for an NF4 weight. Under autocast it is
            taken in autocast's dtype, as `F.linear` would.
        weight: (out_features, in_features), frozen: dense, of x's dtype and perhaps a transposed view, or NF4. None
            for the update alone, as where dropout acts on its x: then x is taken as it comes.
        bias: (out_features,) or None; None for the update alone.
        lora: A (r, in_features), B (out_features, r) and s, or None. x A^T is in autocast's dtype under autocast, else
            in the wider of x's and A's; on a CPU that lacks it, in float32.
        compute_dtype: of the product with an NF4 weight; None for x's. On a CPU that lacks it, float32.

    Returns:
        (..., out_features) in x's dtype, or under autocast in autocast's; of the update alone, in the dtype of x A^T.

    Raises:
        TypeError: an x of another dtype for an NF4 weight. ValueError: an x that has not in_features columns for it.
    """
    lora_A, lora_B, scaling = lora or (None, None, 0.0)
    if weight is not None:
        x = as_autocast(x)
    plain = is_plain_call(x)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, lora_A, lora_B))
    if isinstance(weight, NF4) and (x.dtype not in WEIGHT_DTYPES or x.shape[-1] != weight.columns):
        _refuse(x, weight)
    if weight is not None and plain and not recorded and compute_dtype in (None, x.dtype) and runs_native(x):
        y = cpu.at_once(x, weight, bias, lora)
        if y is not None:
            return y
    dtype = x.dtype if lora_A is None else update_dtype(x, lora_A)
    if weight is not None:
        dtype = arithmetic_dtype(dtype, x.device)
    numbers = (scaling, compute_dtype or x.dtype, dtype)
    out: Tensor
    if not plain and is_transformed():
        out = _differentiable(x, weight, bias, lora, *numbers[1:])
    elif not plain:
        out, _ = _linear_op(x, bias, lora_A, lora_B, *numbers, *flatten(weight))
    elif recorded:
        out, _ = _Linear.apply(x, bias, lora_A, lora_B, numbers, weight, True)
    else:
        out, _ = _run(x, bias, lora_A, lora_B, *numbers, weight)
    return out


def _differentiable(
    x: Tensor,
    weight: Weight | None,
    bias: Tensor | None,
    lora: Lora | None,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """`linear` by PyTorch's own operations, which have derivatives of every kind.

    Args:
        dtype: of x A^T and its product with B.
    """
    y: Tensor | None = None
    if isinstance(weight, NF4):
        with without_autocast():
            y = x.to(compute_dtype) @ nf4_dequantize(weight, compute_dtype).T
            y = (y if bias is None else y + bias).to(x.dtype)
    elif weight is not None:
        y = torch.nn.functional.linear(x, weight, bias)
    if lora is None:
        assert y is not None
        return y
    lora_A, lora_B, scaling = lora
    with without_autocast():
        update = scaling * (x.to(dtype) @ lora_A.to(dtype).T) @ lora_B.to(dtype).T
    return update if y is None else (y + update).to(y.dtype)


def _refuse(x: Tensor, weight: NF4) -> None:
    if x.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}: convert it, for example with .float()")
    raise ValueError(f"x's last dimension ({x.shape[-1]}) must be in_features ({weight.columns})")


class _Linear(torch.autograd.Function):
    """The operation with its backward. W is frozen and has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        numbers: Numbers,
        weight: Weight | None,
        plain: bool,
    ) -> tuple[Tensor, Tensor]:
        """plain: `is_plain_call` of x, so that no dispatch is needed."""
        if plain:
            y, low = _run(x, bias, lora_A, lora_B, *numbers, weight)
        else:
            with below_autograd():
                y, low = _linear_op(x, bias, lora_A, lora_B, *numbers, *flatten(weight))
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)
        needs_x, _, needs_A, *_ = ctx.needs_input_grad
        kept: tuple[Tensor | None, ...] = (None, None, None, None)
        if lora_A is not None:
            kept = (x if needs_A else None, lora_A, lora_B, low)  # dA alone is made from x
        flat = flatten(weight if needs_x else None)
        ctx.save_for_backward(*kept, *flat[:TENSORS])
        ctx.numbers, ctx.sizes = numbers, flat[TENSORS:]
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return y, low

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """The gradients of x, b, A and B, of those that need one."""
        dx = db = dA = dB = None
        needs_x, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        dtype, bias_dtype = ctx.dtypes
        if dy is not None and (needs_x or needs_A or needs_B):
            x, lora_A, lora_B, low, *weight = ctx.saved_tensors
            needed = [needs_x, needs_A, needs_B]
            call = _run_backward_op if is_plain_call(dy) else _linear_backward_op
            call = twice.run_backward if torch.is_grad_enabled() else call  # a gradient that is differentiated
            dx, dA, dB = call(dy, x, lora_A, lora_B, low, *ctx.numbers, needed, *weight, *ctx.sizes)
        if dy is not None and needs_bias:
            db = as_rows(dy).sum(0, dtype=torch.float32).to(bias_dtype)  # (..., N) -> (N,), added up in float32
        # Of an update alone, y and dy are in the adapter's dtype, which need not be x's.
        dx = cast(dx, dtype) if dx is not None and needs_x else None
        return dx, db, dA if needs_A else None, dB if needs_B else None, None, None, None


class Form(Protocol):
    """One way to compute the sums: `dense`, `cpu` or `gpu`."""

    def forward(
        self, rows: Tensor, weight: Any, bias: Tensor | None, update: LowRank | None, compute_dtype: torch.dtype
    ) -> Tensor:
        """rows W^T + b + low up^T: (M, K) -> (M, N), in any dtype."""

    def input_gradient(self, rows: Tensor, weight: Any, update: LowRank | None, compute_dtype: torch.dtype) -> Tensor:
        """rows W + low up: (M, N) -> (M, K), in any dtype."""


def form_for(weight: Weight | None, rows: Tensor) -> Form:
    """The form that multiplies by `weight` on the device of `rows`; `dense` where there is no weight."""
    if not isinstance(weight, NF4):
        return dense
    return _kernels() if use_triton(rows) else cpu


@functools.cache
def _kernels() -> Form:
    from . import gpu  # where Triton may be missing

    return gpu


def _run(
    x: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    weight: Weight | None,
) -> tuple[Tensor, Tensor]:
    """y (..., N), and low (M, r), which is empty without an update."""
    rows, update = as_rows(x), None
    with without_autocast():
        if lora_A is not None and lora_B is not None:
            update = project(rows, lora_A, scaling, adapter_dtype), lora_B
        y = form_for(weight, rows).forward(rows, weight, bias, update, compute_dtype)
    y = from_rows(y if weight is None else cast(y, x.dtype), x)
    return y, x.new_empty(0) if update is None else update[0]


def _run_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    low: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    needed: list[bool],
    weight: Weight | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., K) in dy's dtype, dA and dB; one that is not needed is empty."""
    dx = dA = dB = None
    needs_x, needs_A, needs_B = needed
    rows, update = as_rows(dy), None
    with without_autocast():
        if lora_A is not None and lora_B is not None:
            wide = as_thin_takes(rows, lora_B.shape[1], adapter_dtype)
            if needs_x or needs_A:
                update = project_back(wide, lora_B, scaling, adapter_dtype), lora_A
            if needs_A:
                assert x is not None and update is not None
                dA = grad_of_A(update[0], as_rows(x), lora_A.dtype)
            if needs_B:
                assert low is not None
                dB = grad_of_B(wide, low, lora_B.dtype)
        if needs_x:
            dx = form_for(weight, rows).input_gradient(rows, weight, update, compute_dtype)
            dx = from_rows(cast(dx, dy.dtype), dy)
    return (
        dy.new_empty(0) if dx is None else dx,
        dy.new_empty(0) if dA is None else dA,
        dy.new_empty(0) if dB is None else dB,
    )


def _run_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, bias, lora_A, lora_B, scaling, compute_dtype, dtype, *weight = arguments
    return _run(x, bias, lora_A, lora_B, scaling, compute_dtype, dtype, unflatten(weight))


def _run_backward_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, lora_A, lora_B, low, scaling, compute_dtype, dtype, needed, *weight = arguments
    return _run_backward(dy, x, lora_A, lora_B, low, scaling, compute_dtype, dtype, needed, unflatten(weight))


def _recorded(
    x: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The operation under autograd."""
    scaling, compute_dtype, dtype, *weight = rest
    outputs: tuple[Tensor, Tensor] = _Linear.apply(
        x, bias, lora_A, lora_B, (scaling, compute_dtype, dtype), unflatten(weight), False
    )
    return outputs


def _fake(
    x: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, _, dtype, *flat_weight = rest
    weight = unflatten(flat_weight)
    if weight is None:
        assert lora_B is not None
        y = x.new_empty(*x.shape[:-1], lora_B.shape[0], dtype=dtype)
    else:
        y = x.new_empty(*x.shape[:-1], weight.rows if isinstance(weight, NF4) else weight.shape[0])
    rows = math.prod(x.shape[:-1])  # a symbol where shapes are dynamic, which torch.Size.numel makes a number of
    return y, x.new_empty(0) if lora_A is None else x.new_empty(rows, lora_A.shape[0], dtype=dtype)


def _fake_backward(
    dy: Tensor, x: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, low: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, (needs_x, needs_A, needs_B), *flat_weight = rest
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if needs_x:
        weight = unflatten(flat_weight)
        like = lora_A if weight is None else weight
        assert like is not None
        dx = dy.new_empty(*dy.shape[:-1], like.columns if isinstance(like, NF4) else like.shape[1])
    if needs_A and lora_A is not None:
        dA = lora_A.new_empty(lora_A.shape)
    if needs_B and lora_B is not None:
        dB = lora_B.new_empty(lora_B.shape)
    return dx, dA, dB


_NUMBERS = "float scaling, ScalarType compute_dtype, ScalarType adapter_dtype"

_linear_op = define_op(
    f"linear(Tensor x, Tensor? bias, Tensor? lora_A, Tensor? lora_B, {_NUMBERS}, {SCHEMA}) -> (Tensor y, Tensor low)",
    _run_op,
    fake=_fake,
    check=check_forward,
    autograd=_recorded,
)
_linear_backward_op = define_op(
    f"linear_backward(Tensor dy, Tensor? x, Tensor? lora_A, Tensor? lora_B, Tensor? low, {_NUMBERS}, bool[3] needed, "
    f"{SCHEMA}) -> (Tensor dx, Tensor dA, Tensor dB)",
    _run_backward_op,
    fake=_fake_backward,
    check=check_backward,
)

"""The arguments of `experts_linear` and its backward, held against each other before anything reads their memory.

The values of the offsets are looked at where they are known: in `loop` on a CPU, and by the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear.checks import check_scaling
from ..nf4.checks import FLOATING, WEIGHT_DTYPES, check_weight
from .stack import NF4Stack, Stack, unflatten_stack


def check_sizes(x: Tensor, offsets: Tensor, weight: Stack | None, lora_A: Tensor | None, lora_B: Tensor | None) -> None:
    """Raise ValueError or TypeError for arguments of `experts_linear` whose sizes, dtypes or devices do not fit."""
    if (lora_A is None) != (lora_B is None) or (weight is None and lora_A is None):
        raise ValueError("experts_linear wants a weight, or A and B, or both")
    if x.dim() != 2 or offsets.dim() != 1:
        raise ValueError(
            f"x must be (rows, in_features) and offsets (experts,), got {x.dim()} and {offsets.dim()} dims"
        )
    if offsets.dtype != torch.int32 or offsets.device != x.device:
        raise TypeError(f"offsets must be int32 on {x.device}, got {offsets.dtype} on {offsets.device}")
    if isinstance(weight, NF4Stack) and x.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16 for NF4 weights, got {x.dtype}")
    experts, columns = offsets.shape[0], x.shape[1]
    rows = None
    if weight is not None:
        shape = _shape_of(weight)
        if len(shape) != 3 or (shape[0], shape[2]) != (experts, columns):
            raise ValueError(f"the experts' weights are {shape}; expected ({experts}, out_features, {columns})")
        rows = shape[1]
    if lora_A is not None and lora_B is not None:
        rank = lora_A.shape[1] if lora_A.dim() == 3 else None
        rows = lora_B.shape[1] if rows is None and lora_B.dim() == 3 else rows
        if tuple(lora_A.shape) != (experts, rank, columns) or tuple(lora_B.shape) != (experts, rows, rank):
            raise ValueError(
                f"A is {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}; expected ({experts}, r, {columns}) and "
                f"({experts}, {'out_features' if rows is None else rows}, r)"
            )


def check_forward(
    x: Tensor, offsets: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, *numbers_and_weight: Any
) -> None:
    """Raise ValueError or TypeError unless these are arguments of the operation `experts_linear`."""
    scaling, compute_dtype, adapter_dtype, *flat_weight = numbers_and_weight
    weight = _checked_stack(flat_weight, x.device)
    check_sizes(x, offsets, weight, lora_A, lora_B)
    _check_tensors(x.device, compute_dtype, adapter_dtype, x=x, lora_A=lora_A, lora_B=lora_B)
    check_scaling(scaling, adapter_dtype)
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise TypeError(f"x and the experts' dense weights must have one dtype, got {x.dtype} and {weight.dtype}")


def check_backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    low: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    needed: list[bool],
    *flat_weight: Any,
) -> None:
    """Raise ValueError or TypeError unless these are arguments of the operation `experts_linear_backward`."""
    weight = _checked_stack(flat_weight, dy.device)
    _check_tensors(dy.device, compute_dtype, adapter_dtype, dy=dy, x=x, lora_A=lora_A, lora_B=lora_B, low=low)
    check_scaling(scaling, adapter_dtype)
    if len(needed) != 3:
        raise ValueError(f"needed says of dx, dA and dB whether they are needed, got {len(needed)} answers")
    _, needs_A, needs_B = needed
    if dy.dim() != 2:
        raise ValueError(f"dy must be (rows, out_features), got {tuple(dy.shape)}")
    like = weight if weight is not None else lora_A
    if like is None:
        raise ValueError("experts_linear_backward wants a weight, or A and B, or both")
    columns = _shape_of(like)[-1]
    # What the forward took: its sizes must give this dy.
    check_sizes(dy.new_empty(dy.shape[0], columns, device="meta"), offsets.to("meta"), weight, lora_A, lora_B)
    if offsets.device != dy.device:
        raise TypeError(f"offsets must be on {dy.device}, got {offsets.device}")
    width = _shape_of(weight)[1] if weight is not None else lora_B.shape[1]  # type: ignore[union-attr]
    if dy.shape[1] != width:
        raise ValueError(f"dy has {dy.shape[1]} columns, and the experts give {width}")
    if lora_A is None and (needs_A or needs_B):
        raise ValueError("gradients of A and B are asked for, and A and B are None")
    if needs_A and (x is None or tuple(x.shape) != (dy.shape[0], columns)):
        raise ValueError(f"the gradient of A wants x of shape ({dy.shape[0]}, {columns}), got {_shape_or_none(x)}")
    if needs_B and lora_A is not None and (low is None or tuple(low.shape) != (dy.shape[0], lora_A.shape[1])):
        wanted = (dy.shape[0], lora_A.shape[1])
        raise ValueError(f"the gradient of B wants low of shape {wanted}, got {_shape_or_none(low)}")
    if needs_B and low is not None and low.dtype != adapter_dtype:
        raise TypeError(f"low must be of the adapter's dtype, {adapter_dtype}, got {low.dtype}")


def _checked_stack(flat_weight: Sequence[Any], device: torch.device) -> Stack | None:
    weight = unflatten_stack(flat_weight)
    if not isinstance(weight, NF4Stack):
        if any(isinstance(given, Tensor) or given for given in flat_weight[1:]):
            raise ValueError("NF4 weights want an absmax, and dense ones nothing but their tensor")
        if weight is not None and (weight.dtype not in FLOATING or weight.device != device):
            raise TypeError(f"the experts' dense weights must be floating point on {device}, got {weight.dtype}")
        return weight
    if weight.codes is None or weight.codes.dim() != 2:
        raise ValueError(f"codes must be (experts, bytes), got {_shape_or_none(weight.codes)}")
    experts = weight.codes.shape[0]
    for name in ("absmax", "nested_absmax", "offset"):
        tensor = getattr(weight, name)
        if tensor is not None and (tensor.dim() != (1 if name == "offset" else 2) or tensor.shape[0] != experts):
            raise ValueError(f"{name} must have {experts} experts, as the codes have, got {tuple(tensor.shape)}")
    if experts:
        check_weight(weight.expert(0), device)
    return weight


def _check_tensors(
    device: torch.device, compute_dtype: torch.dtype, adapter_dtype: torch.dtype, **tensors: Tensor | None
) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype not in FLOATING or tensor.layout != torch.strided):
            raise TypeError(f"{name} must be a dense floating-point tensor, got {tensor.dtype}, {tensor.layout}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    for name, dtype in (("compute_dtype", compute_dtype), ("adapter_dtype", adapter_dtype)):
        if dtype not in FLOATING:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype}")


def _shape_of(weight: Stack) -> tuple[int, ...]:
    return (weight.experts, weight.rows, weight.columns) if isinstance(weight, NF4Stack) else tuple(weight.shape)


def _shape_or_none(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)

"""The arguments of the operations `linear` and `linear_backward`, held against each other before anything is read.

Anybody can call an operation of `torch.ops.minipeft` with anything, and what computes it reads one argument's memory by
sizes that come from another. The plain way of `op.linear`, which a layer takes at every token, does not come by here:
there, what is passed by its address is looked at where the address is taken.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..nf4.checks import FLOATING, WEIGHT_DTYPES, checked_weight
from ..packed import NF4


def check_forward(
    x: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    *flat_weight: Any,
) -> None:
    """Raise ValueError or TypeError unless these are arguments of the operation `linear`."""
    _check_tensor("x", x, x.device)
    weight = checked_weight(flat_weight, x.device)
    _check_dtypes("x", x, compute_dtype, adapter_dtype, weight)
    check_scaling(scaling, adapter_dtype)
    rows, _ = _sizes(weight, lora_A, lora_B, None, x.shape[-1], x.device)
    if bias is not None:
        if weight is None:
            raise ValueError("the update alone has no bias")
        _check_tensor("bias", bias, x.device)
        if bias.dim() != 1 or bias.shape[0] != rows:
            raise ValueError(f"bias must have {rows} elements, as many as the weight has rows, got {_shape(bias)}")


def check_backward(
    dy: Tensor,
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
    """Raise ValueError or TypeError unless these are arguments of the operation `linear_backward`."""
    _check_tensor("dy", dy, dy.device)
    weight = checked_weight(flat_weight, dy.device)
    _check_dtypes("dy", dy, compute_dtype, adapter_dtype, weight)
    check_scaling(scaling, adapter_dtype)
    if len(needed) != 3:
        raise ValueError(f"needed says of dx, dA and dB whether they are needed, got {len(needed)} answers")
    needs_x, needs_A, needs_B = needed
    if weight is not None or lora_A is not None or lora_B is not None or needs_x:
        _, columns = _sizes(weight, lora_A, lora_B, dy.shape[-1], None, dy.device)
    if lora_A is None:
        if needs_A or needs_B:
            raise ValueError("gradients of A and B are asked for, and A and B are None")
        return
    if needs_A:
        if x is None:
            raise ValueError("the gradient of A is made from x, which is None")
        _check_tensor("x", x, dy.device)
        if x.shape[:-1] != dy.shape[:-1] or x.shape[-1] != columns:
            raise ValueError(f"x must be {(*dy.shape[:-1], columns)}, as dy and A say, got {_shape(x)}")
    if needs_B:
        if low is None:
            raise ValueError("the gradient of B is made from low, which is None")
        _check_tensor("low", low, dy.device)
        _check_shape("low", low, (math.prod(dy.shape[:-1]), lora_A.shape[0]))
        if low.dtype != adapter_dtype:
            raise TypeError(f"low must be of the adapter's dtype, {adapter_dtype}, got {low.dtype}")


def check_addends(
    rows: int, width: int, device: torch.device, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> None:
    """Raise ValueError unless what a kernel adds to a product (rows, width) fits it.

    Args:
        bias: (width,). low: (rows, r). up: (width, r).
    """
    if bias is not None and (bias.shape != (width,) or bias.device != device):
        raise ValueError(f"bias must be ({width},) on {device}, got {_shape(bias)} on {bias.device}")
    if low is not None and (low.dim() != 2 or low.shape[0] != rows or low.device != device):
        raise ValueError(f"x A^T must be ({rows}, r) on {device}, got {_shape(low)} on {low.device}")
    if low is not None and up is not None and (up.shape != (width, low.shape[1]) or up.device != device):
        raise ValueError(f"the update's factor must be ({width}, r) on {device}, got {_shape(up)} on {up.device}")


def check_scaling(scaling: float, dtype: torch.dtype) -> None:
    """Raise ValueError for a scaling that its arithmetic has no number for: float32, or float64 if `dtype` is."""
    most = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    if most < abs(scaling) < math.inf:
        raise ValueError(f"scaling must be within {most:g}, as {dtype} is multiplied, got {scaling!r}")


def _check_tensor(name: str, t: Tensor, device: torch.device) -> None:
    if t.dim() < 1 or t.device != device or t.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor on {device} of one dimension or more, got {_shape(t)} on {t.device}, "
            f"{t.layout}"
        )
    _check_dtype(name, t.dtype)


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {dtype}")


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.dim() != len(shape) or any(a != b for a, b in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {tuple(shape)}, as the others say, got {_shape(t)}")


def _check_dtypes(
    name: str,
    x: Tensor,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    weight: Tensor | NF4 | None,
) -> None:
    _check_dtype("compute_dtype", compute_dtype)
    _check_dtype("adapter_dtype", adapter_dtype)
    if isinstance(weight, NF4):
        for what, dtype in ((name, x.dtype), ("compute_dtype", compute_dtype)):
            if dtype not in WEIGHT_DTYPES:
                raise TypeError(f"{what} must be float32, bfloat16 or float16 for an NF4 weight, got {dtype}")


def _sizes(
    weight: Tensor | NF4 | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    rows: int | None,
    columns: int | None,
    device: torch.device,
) -> tuple[int, int]:
    """out_features and in_features, on which weight, A, B and the numbers given must agree."""
    if isinstance(weight, NF4):
        rows, columns = _agree(rows, columns, weight.rows, weight.columns)
    elif weight is not None:
        rows, columns = _agree(rows, columns, *weight.shape)
    if (lora_A is None) != (lora_B is None) or (weight is None and lora_A is None):
        raise ValueError("a weight, or A and B, or all of them are needed")
    if lora_A is not None and lora_B is not None:
        _check_tensor("A", lora_A, device)
        _check_tensor("B", lora_B, device)
        rank = lora_A.shape[0]
        rows = lora_B.shape[0] if rows is None else rows
        columns = lora_A.shape[-1] if columns is None else columns
        _check_shape("A", lora_A, (rank, columns))
        _check_shape("B", lora_B, (rows, rank))
    assert rows is not None and columns is not None
    return rows, columns


def _agree(rows: int | None, columns: int | None, weight_rows: int, weight_columns: int) -> tuple[int, int]:
    if columns is not None and columns != weight_columns:
        raise ValueError(f"x's last dimension ({columns}) must be in_features ({weight_columns})")
    if rows is not None and rows != weight_rows:
        raise ValueError(f"dy's last dimension ({rows}) must be out_features ({weight_rows})")
    return weight_rows, weight_columns


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)

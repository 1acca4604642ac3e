"""Checks of an NF4 weight and of what becomes one, before compiled code or a kernel reads its tensors by address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packed import NF4, unflatten

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that products, and decoded weights, may have."""

_DTYPES = (torch.uint8, torch.float32, torch.float32)
_NESTED_DTYPES = (torch.uint8, torch.uint8, torch.float32, torch.float32, torch.float32, torch.float32)


def needed_of(weight: NF4) -> tuple[tuple[int, ...], tuple[torch.dtype, ...]]:
    """The number of elements that will be read of each tensor of a weight, and its dtype: of three tensors, or of six.

    Raises:
        ValueError: negative sizes, or an empty block.
    """
    rows, columns, blocksize, nested_blocksize = weight.rows, weight.columns, weight.blocksize, weight.nested_blocksize
    if rows < 0 or columns < 0:
        raise ValueError(f"rows ({rows}) and columns ({columns}) of the NF4 weight must not be negative")
    if blocksize < 1 or nested_blocksize < 1:
        raise ValueError(f"blocksize ({blocksize}) and nested_blocksize ({nested_blocksize}) must be at least 1")
    blocks = -(-rows * columns // blocksize)
    counts = ((rows * columns + 1) // 2, blocks, 16, -(-blocks // nested_blocksize), 256, 1)
    return counts, _DTYPES if weight.nested_absmax is None else _NESTED_DTYPES


def misfit(name: str, tensor: Tensor | None, count: int, dtype: torch.dtype, device: torch.device) -> ValueError:
    """The error of a weight's tensor that is not `count` elements of `dtype` on `device`."""
    if tensor is None:
        got = "None"
    else:
        got = f"{tensor.numel()} of {tensor.dtype} on {tensor.device}, {tensor.layout}"
    return ValueError(f"{name} of the NF4 weight must be {count} of {dtype} on {device}, got {got}")


def check_weight(weight: NF4, device: torch.device) -> None:
    """Raise ValueError unless the weight's tensors hold all that its sizes say, on `device`."""
    counts, dtypes = needed_of(weight)
    if weight.blocksize % 2:
        raise ValueError(f"blocksize ({weight.blocksize}) must be even: two weights share a byte")
    for name, tensor, count, dtype in zip(NF4._fields, weight.tensors(), counts, dtypes):  # noqa: B905, the shortest decides
        if tensor is None or tensor.dtype != dtype or tensor.device != device or tensor.layout != torch.strided:
            raise misfit(name, tensor, count, dtype, device)
        if tensor.numel() < count or (name == "offset" and tensor.numel() != 1):
            raise misfit(name, tensor, count, dtype, device)
        if tensor.dim() != 1 and name not in ("codes", "offset"):
            raise ValueError(f"{name} of the NF4 weight must have one dimension, got {tuple(tensor.shape)}")


def check_for_kernel(weight: NF4, device: torch.device) -> None:
    """`check_weight`, and what the Triton kernels want beside it: blocks of a power of two."""
    check_weight(weight, device)
    if weight.blocksize & (weight.blocksize - 1):
        raise ValueError(f"blocksize ({weight.blocksize}) must be a power of two for the Triton kernels")


def check_dequantize(dtype: torch.dtype, *flat_weight: Any) -> None:
    """Raise unless these are arguments of the operation `nf4_dequantize`."""
    weight = checked_weight(flat_weight, None)
    if not isinstance(weight, NF4):
        raise ValueError("nf4_dequantize wants an NF4 weight: codes and absmax, at least")
    if dtype not in FLOATING:
        raise TypeError(f"NF4 weights are decoded to float64, float32, bfloat16 or float16, got {dtype}")


def checked_weight(flat_weight: Sequence[Any], device: torch.device | None) -> Tensor | NF4 | None:
    """The weight that came as arguments of `packed.SCHEMA`.

    Args:
        device: that it must be on; None for that of its codes.

    Raises:
        ValueError, TypeError: it is neither nothing, nor a dense matrix of a floating-point dtype, nor a whole NF4 one.
    """
    weight = unflatten(flat_weight)
    if isinstance(weight, NF4):
        if weight.codes is None:
            raise ValueError("an NF4 weight wants its codes, got None with an absmax")
        check_weight(weight, device or weight.codes.device)
        return weight
    if any(isinstance(given, Tensor) or given for given in flat_weight[1:]):
        raise ValueError("an NF4 weight wants an absmax, and a dense one nothing but its matrix")
    if weight is not None:
        if weight.dim() != 2 or weight.layout != torch.strided or (device is not None and weight.device != device):
            raise ValueError(
                f"a dense weight must be a matrix on {device}, got {tuple(weight.shape)} on {weight.device}, "
                f"{weight.layout}"
            )
        if weight.dtype not in FLOATING:
            raise TypeError(f"a dense weight must be float64, float32, bfloat16 or float16, got {weight.dtype}")
    return weight


def check_quantize(w: Tensor, blocksize: int) -> None:
    """Raise unless these are arguments of the operation `nf4_quantize`."""
    check_blocksize(blocksize)
    if w.dtype not in WEIGHT_DTYPES or w.layout != torch.strided:
        raise TypeError(
            f"NF4 quantizes dense float32, bfloat16 and float16 weights, got {w.dtype}, {w.layout}: convert the weight "
            "first, for example with .float()"
        )


def check_blocksize(blocksize: int) -> None:
    """Raise ValueError unless `blocksize` is a power of two from 32 to 4096."""
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be a power of two from 32 to 4096, got {blocksize!r}")


def check_quantize_absmax(absmax: Tensor) -> None:
    """Raise unless this is the argument of the operation `quantize_absmax`."""
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.layout != torch.strided:
        raise ValueError(f"absmax must be float32 (blocks,), got {absmax.dtype} {tuple(absmax.shape)}, {absmax.layout}")

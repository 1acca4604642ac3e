"""The cases of `linear` by name, as `minipeft.kernels` has them; where an argument is not explained, see `linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import NF4
from .op import linear


def nf4_matmul(x: Tensor, weight: NF4, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None) -> Tensor:
    """x W^T + b with W in NF4 (Dettmers et al. 2023, equation 5), differentiable in x and b.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.

    Returns:
        (..., out_features) in x's dtype, or under autocast in autocast's.

    Raises:
        TypeError: another dtype. ValueError: x has not in_features columns.
    """
    return linear(x, weight, bias, compute_dtype=compute_dtype)


def lora_matmul(
    x: Tensor,
    weight: NF4,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + s (x A^T) B^T + b with W in NF4: differentiable in x, A, B and b.

    x is read once for both products, the update is added where the base product is summed, and the sum is rounded
    once. Needs the same x in both products, so not for training with dropout.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        lora_A: (r, in_features). lora_B: (out_features, r). scaling: s.

    Returns:
        (..., out_features) in x's dtype, or under autocast in autocast's.

    Raises:
        TypeError: another dtype. ValueError: x has not in_features columns.
    """
    return linear(x, weight, bias, (lora_A, lora_B, scaling), compute_dtype)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as `F.linear`, differentiable in x and b; W (out_features, in_features) may be a transposed view.

    On a CPU without instructions for the dtype of x the product is in float32 (see `arithmetic_dtype`).

    Returns:
        (..., out_features) in x's dtype, or under autocast in autocast's.
    """
    return linear(x, weight, bias)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """x W^T + s (x A^T) B^T + b with W dense and frozen: differentiable in x, A, B and b.

    Args:
        x: (..., in_features), floating point.
        lora_A: (r, in_features). lora_B: (out_features, r). scaling: s.

    Returns:
        (..., out_features) in x's dtype, or under autocast in autocast's.
    """
    return linear(x, weight, bias, (lora_A, lora_B, scaling))


def lora_update(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """s (x A^T) B^T (Hu et al. 2021, equation 3, without the base product), differentiable in x, A and B.

    Args:
        x: (..., in_features), floating point.
        lora_A: (r, in_features). lora_B: (out_features, r). scaling: s.

    Returns:
        (..., out_features), in autocast's dtype under autocast, else in the wider of x's and lora_A's.
    """
    return linear(x, None, lora=(lora_A, lora_B, scaling))

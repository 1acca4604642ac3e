"""The leading dimensions of x as one, for a product of matrices, and put back."""

import math
from typing import Any

import torch
from torch import Tensor

_unsafe_view: Any = torch.ops.aten._unsafe_view.default


def as_rows(x: Tensor) -> Tensor:
    """(..., n) -> (rows, n); -1 would not do where n is 0."""
    if x.dim() == 2:
        return x
    *leading, n = x.shape
    return x.reshape(math.prod(leading), n)


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """(rows, n) -> (..., n), with the leading dimensions of x.

    No view: autograd forbids in-place changes of a view that a Function returned, and models make them.
    """
    if x.dim() == 2:
        return y
    shape = (*x.shape[:-1], y.shape[1])
    if y.requires_grad or not y.is_contiguous():  # the former only of a dense W that is not frozen after all
        return _unsafe_view(y, shape)
    return y.resize_(shape)  # y was made by the product: as many numbers in another shape, and nothing moves

"""The contract of modules whose frozen weights are packed into fewer bits than their numbers have."""

from __future__ import annotations

import torch
from torch import nn


class Packed(nn.Module):
    """A module that holds some of its frozen weights as packed codes.

    Attributes:
        weight_dtype: The dtype that the weights had before they were packed, or that the module was cast to since.
    """

    weight_dtype: torch.dtype

    def packed_sizes(self) -> list[tuple[nn.Parameter, int]]:
        """The parameters that hold codes, each with how many numbers it stands for."""
        raise NotImplementedError

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module with dense weights, in `dtype` or that which they had: another object, or this one, changed."""
        raise NotImplementedError

    @classmethod
    def make_dense(cls, model: nn.Module, dtype: torch.dtype | None) -> None:
        """Make all such modules of `model` dense; cast it to `dtype`, or leave each its own."""
        raise NotImplementedError


class PackedLayer(Packed):
    """A linear layer whose weight is packed.

    Attributes:
        weight: The packed codes, of any shape.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter

    def packed_sizes(self) -> list[tuple[nn.Parameter, int]]:
        return [(self.weight, self.in_features * self.out_features)]


def numbers_of(model: nn.Module) -> dict[int, int]:
    """The id of each parameter of `model` that holds codes -> how many numbers it stands for."""
    return {id(p): n for module in model.modules() if isinstance(module, Packed) for p, n in module.packed_sizes()}

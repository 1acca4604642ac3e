"""Tensors of which each of several processes has a part: DTensors, as FSDP's second version makes of parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """True for a part of a tensor, of which other processes have the rest."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """`tensor`; of a shard the whole, for which all processes must ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()

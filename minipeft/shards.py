"""Tensors of which each of several processes has a part: DTensors, as FSDP's second version makes of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """True for a part of a tensor, of which other processes have the rest."""
    return hasattr(tensor, "full_tensor")


def check_not_split(model: Any) -> None:
    """Raise ValueError for a model that transformers split over processes by tensor parallelism (`tp_plan`).

    Its layers compute on parts of their inputs and outputs, of which an adapter's factors would have to be parts, too.
    """
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"{type(model).__name__} is split over {model._tp_size} processes by tensor parallelism (tp_plan), in "
            "which adapters cannot take part: load it without tp_plan, and shard it afterwards (FSDP2's fully_shard; "
            "minipeft train --fsdp)"
        )


def whole(tensor: Tensor) -> Tensor:
    """`tensor`; of a shard the whole, for which all processes must ask."""
    if not is_sharded(tensor):
        return tensor
    shard: Any = tensor
    # A part that was moved to host memory goes back to where its processes speak to one another.
    kind = shard.device_mesh.device_type
    gathered: Tensor = (shard if shard.device.type == kind else shard.to(kind)).full_tensor()
    return gathered


@torch.no_grad()
def own_part(tensor: Any) -> Tensor:
    """`tensor`; of a shard what this process has of it, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def part_of(tensor: Any, shard: Any) -> Tensor:
    """This process's part of `tensor`, which is whole or a shard itself, where `shard` of the same shape has its own.

    Raises ValueError where `shard` is laid out in a way of which no part can be told (FSDP2 within tensor parallelism).
    """
    if is_sharded(tensor):
        if tensor.placements == shard.placements and tensor.device_mesh == shard.device_mesh:
            return own_part(tensor)
        tensor = whole(tensor)
    mesh = shard.device_mesh
    for size, at, placement in zip(mesh.shape, mesh.get_coordinate(), shard.placements, strict=True):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise ValueError(f"a tensor is laid out over processes as {placement}, and can be given no whole values")
        # As DTensors are cut: of too few rows the last processes have none.
        parts = tensor.chunk(size, placement.dim)
        tensor = parts[at] if at < len(parts) else tensor.narrow(placement.dim, 0, 0)
    return tensor


def laid_out(tensor: Tensor, shard: Tensor) -> Tensor:
    """The shard of a whole `tensor` that is laid out as `shard`, where that lies; `tensor` if that is no shard."""
    if not is_sharded(shard):
        return tensor
    result = torch.empty_like(shard, dtype=tensor.dtype)
    own_part(result).copy_(part_of(tensor, shard))
    return result


def empty_like(shard: Any, dtype: torch.dtype) -> Tensor:
    """A tensor in host memory that is laid out over the processes as `shard` is, its values not set."""
    return torch.empty_like(shard, dtype=dtype, device="cpu", memory_format=torch.contiguous_format)

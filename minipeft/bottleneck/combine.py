"""Bottleneck adapters beside one another: as weighted averages, and each for some rows of a batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from minipeft.adapter import AdaptedModel
from minipeft.attach import adapter_modules, add_adapter, config_of, delete_adapter, set_trainable
from minipeft.bottleneck.config import BottleneckConfig

# The values with which arguments of LoRA's combinations ask for nothing; those that are not here are None.
_LORAS = {"svd_full_matrices": True, "majority_sign_method": "total"}


def check_rows(name: str, config: BottleneckConfig) -> None:
    """Any such adapter can go by row."""


@torch.no_grad()
def add_weighted_adapter(
    model: AdaptedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "linear",
    **others: Any,
) -> None:
    """Add an adapter whose tensors are the weighted sum of others'; it is frozen and not active.

    With weights that add up to 1 it is AdapterHub's `average_adapter`; weights may be negative (task arithmetic,
    Ilharco et al. 2022). Unlike LoRA's updates the networks are not linear in their tensors: the result is a point
    between adapters that were trained from one start, not the sum of what they do.

    Args:
        weights: One for each of `adapters`.
        adapter_name: Of the new adapter; not taken yet.
        combination_type: "linear", the only one.

    Raises ValueError for unknown adapters, adapters of other methods or of different shapes, and for arguments of
        LoRA's combinations.
    """
    if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
        raise ValueError(f"adapters must be different names with a weight each, got {adapters} and {weights}")
    asked = {name: value for name, value in others.items() if value != _LORAS.get(name)}
    if combination_type != "linear" or asked:
        asked = {"combination_type": combination_type, **asked}
        raise ValueError(f"bottleneck adapters combine by combination_type='linear' alone, got {asked}")
    configs = [config_of(model, adapter) for adapter in adapters]
    for adapter, config in zip(adapters, configs, strict=True):
        if not isinstance(config, BottleneckConfig):
            raise ValueError(
                f"adapter {adapter!r} is no bottleneck adapter ({type(config).__name__}): they combine with their like"
            )
    add_adapter(model, adapter_name, copy.deepcopy(configs[0]), init=False)
    try:
        for path, module in adapter_modules(model):
            states = [module.adapter_state(adapter) for adapter in adapters]
            for name, tensor in module.adapter_state(adapter_name).items():
                parts = [state.get(name) for state in states]
                for adapter, part in zip(adapters, parts, strict=True):
                    if part is None or part.shape != tensor.shape:
                        found = "no such tensor" if part is None else f"shape {tuple(part.shape)}"
                        raise ValueError(
                            f"adapter {adapter!r} does not combine with {adapters[0]!r}: {path}.{name} has "
                            f"{found}, expected {tuple(tensor.shape)}"
                        )
                wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts if p is not None]
                total = sum(weight * part for weight, part in zip(weights, wide, strict=True))
                tensor.data.copy_(torch.as_tensor(total))
    except ValueError:
        delete_adapter(model, adapter_name)
        raise
    set_trainable(model, adapter_name, False)

"""The adapters attached to a model: PEFT's `get_layer_status` and `get_model_status`, and counts of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from minipeft.adapter import AdaptedModel, PackedLayer
from minipeft.attach import adapter_modules, switch_of


@dataclasses.dataclass(frozen=True)
class LayerStatus:
    """One adapted module. Dictionaries are keyed by adapter name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    available_adapters: list[str]
    requires_grad: dict[str, bool]
    devices: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """The whole model; `requires_grad` of an adapter is "irregular" when its tensors differ."""

    base_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    available_adapters: list[str]
    requires_grad: dict[str, bool | str]
    devices: dict[str, list[str]]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters with a gradient, all parameters); a packed weight counts all the numbers that it stands for."""
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLayer)}
    total = sum(packed.get(id(p), p.numel()) for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total


def print_parameters(model: nn.Module) -> None:
    """Print the two numbers of `count_parameters` and their ratio."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The status of every adapted module, in the model's order."""
    layers = []
    for path, module in adapter_modules(model):
        names = sorted(module.adapter_names())
        tensors = {name: list(module.adapter_state(name).values()) for name in names}
        layers.append(
            LayerStatus(
                name=path,
                module_type=type(module).__name__,
                enabled=module.switch.enabled,
                active_adapters=list(module.switch.active),
                merged_adapters=list(module.merged_adapters),
                available_adapters=names,
                requires_grad={n: all(t.requires_grad for t in ts) for n, ts in tensors.items()},
                devices={n: sorted({str(t.device) for t in ts}) for n, ts in tensors.items()},
            )
        )
    return layers


def get_model_status(model: Any) -> ModelStatus:
    """The status of a model with adapters.

    Raises TypeError for a model without them.
    """
    if not isinstance(model, AdaptedModel):
        raise TypeError(f"get_model_status needs a model with adapters, got {type(model).__name__}")
    layers, switch = get_layer_status(model), switch_of(model)
    names = list(model.peft_config)
    having = {n: [layer for layer in layers if n in layer.available_adapters] for n in names}
    grads = {n: {layer.requires_grad[n] for layer in having[n]} for n in names}
    trainable, total = count_parameters(model)
    return ModelStatus(
        base_model_type=type(model).__name__,
        peft_types={n: model.peft_config[n].type_name for n in names},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=switch.enabled,
        active_adapters=list(switch.active),
        merged_adapters=sorted({m for layer in layers for m in layer.merged_adapters}),
        available_adapters=sorted(names),
        requires_grad={n: g.pop() if len(g) == 1 else "irregular" for n, g in grads.items()},
        devices={n: sorted({d for layer in having[n] for d in layer.devices[n]}) for n in names},
    )

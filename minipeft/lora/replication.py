"""`layer_replication`: the base model's layers repeated, each with LoRA of its own over shared weights (PEFT's field).

`[[0, 4], [2, 5]]` makes layers 0 to 3 and then 2 to 4 of a model's five. The deeper model is the base from then on:
disabling or unloading adapters gives it, and merging gives each layer a weight of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from minipeft.attach import adapter_modules

_MARK = "_replicated_layers"


def check_map(layer_map: Any) -> None:
    """Raise ValueError unless `layer_map` is None or a list of pairs [first layer, the one after the last]."""
    if layer_map is None:
        return
    if not isinstance(layer_map, list | tuple) or not all(map(_is_span, layer_map)):
        raise ValueError(
            "layer_replication must be a list of pairs [first layer, the one after the last], such as "
            f"[[0, 4], [2, 5]], got {layer_map!r}"
        )


def _is_span(pair: Any) -> bool:
    numbers = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(number) is int for number in pair)
    return numbers and 0 <= pair[0] < pair[1]


def check_replicated(model: nn.Module, layer_map: Sequence[Sequence[int]] | None) -> None:
    """Raise ValueError if an adapter with this `layer_replication` is to go to a model whose layers are others."""
    if layer_map and vars(model).get(_MARK) != _numbers(layer_map):
        raise ValueError(
            f"layer_replication={list(layer_map)!r} is for the first adapter of a model, by get_peft_model or "
            "PeftModel.from_pretrained: another one may have the same value, or none"
        )


def replicate(model: Any, layer_map: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Put the layers that `layer_map` names in the place of the model's. Returns: what undoes it.

    Nothing happens to a model whose layers are these already. The copies are modules of their own over shared tensors.

    Raises ValueError for a model whose layers are not found, that lacks a layer, or that has adapters.
    """
    order = _numbers(layer_map)
    if vars(model).get(_MARK) == order:
        return lambda: None
    if _MARK in vars(model) or adapter_modules(model):
        check_replicated(model, layer_map)
    config: Any = model.config.get_text_config() if hasattr(model, "config") else None
    depth: Any = getattr(config, "num_hidden_layers", None)
    found = [path for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(found) != 1:
        raise ValueError(
            f"layer_replication: Could not locate the layers of {type(model).__name__}: the lists of modules as long "
            f"as its config's num_hidden_layers ({depth}) are {found}, which must be one"
        )
    if max(order) >= depth:
        raise ValueError(f"layer_replication={list(layer_map)!r} names layer {max(order)}; the model has {depth}")
    layers: Any = model.get_submodule(found[0])
    parent, _, name = found[0].rpartition(".")
    owner: Any = model.get_submodule(parent)
    fields = {field: getattr(config, field) for field in ("num_hidden_layers", "layer_types") if hasattr(config, field)}

    setattr(owner, name, nn.ModuleList([_twin(layers[number], place) for place, number in enumerate(order)]))
    config.num_hidden_layers = len(order)
    if fields.get("layer_types") is not None:
        config.layer_types = [fields["layer_types"][number] for number in order]
    vars(model)[_MARK] = order

    def undo() -> None:
        setattr(owner, name, layers)
        for field, value in fields.items():
            setattr(config, field, value)
        vars(model).pop(_MARK, None)

    return undo


def _numbers(layer_map: Sequence[Sequence[int]]) -> list[int]:
    return [number for first, end in layer_map for number in range(first, end)]


def _twin(layer: nn.Module, place: int) -> nn.Module:
    """A copy of `layer` over its tensors, which knows that it is the layer of number `place`."""
    tensors = [*layer.parameters(), *layer.buffers()]
    twin = copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})
    part: Any
    for part in twin.modules():
        # By it the layer finds its keys in the cache.
        if hasattr(part, "layer_idx"):
            part.layer_idx = place
    return twin

"""PEFT's functions about names: short lists of targets, and the names of the tensors that adapters have in a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from minipeft.attach import adapter_modules
from minipeft.methods import method_of
from minipeft.mixins import own_attributes
from minipeft.utilities import ALL_LINEAR
from minipeft.wrappers import BaseTunerLayer

# Dictionaries by adapter of what is trained beside a method's own tensors.
_BESIDE = ("modules_to_save", "trained_bias")


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """`peft_config`, with names in the place of "all-linear"; the names are those of the model's layers.

    Raises ValueError for a model without such layers.
    """
    if peft_config.target_modules == ALL_LINEAR:
        method_of(str(peft_config.type_name)).load("attach").find(model, peft_config, [])
    return peft_config


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """The starts of the names that the tensors of a method's adapters have in `model.state_dict()`.

    What is trained whole or by the row (`modules_to_save`, `bias`, `trainable_token_indices`) is left out, as in PEFT.

    Args:
        adapter_name: Only of this adapter; by default of all.
    """
    found = set()
    for path, module in adapter_modules(model):
        for name in own_attributes(module) if isinstance(module, BaseTunerLayer) else ():
            holder = module._modules.get(name)
            if isinstance(holder, nn.ModuleDict | nn.ParameterDict) and name not in _BESIDE:
                if adapter_name is None:
                    found.add(f"{path}.{name}".removeprefix("."))
                elif adapter_name in holder:
                    found.add(f"{path}.{name}.{adapter_name}".removeprefix("."))
    return found


def _filter_state_dict_by_key_prefixes(state_dict: Mapping[str, Any], prefixes: Collection[str]) -> dict[str, Any]:
    """The entries whose name is one of `prefixes`, or goes on after it with a dot."""
    starts = tuple(f"{prefix}." for prefix in prefixes)
    return {name: value for name, value in state_dict.items() if f"{name}.".startswith(starts)}

"""The tensors of the base model inside a model with adapters: their state dict, out and in (PEFT's), their dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule, base_modules
from minipeft.mixins import own_attributes
from minipeft.state import LoadResult


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base model, under the names that it gives them itself; merged ones as they are now."""
    added = _added(model)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(added)}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Copy `state_dict`, under the base model's own names, into it; adapters stay as they are.

    Returns: (missing_keys, unexpected_keys).

    Raises RuntimeError for missing and unexpected names if `strict`, ValueError while adapters are merged: the base
        weights that stand aside then would come back.
    """
    merged = sorted({name for m in model.modules() if isinstance(m, AdapterModule) for name in m.merged_adapters})
    if merged:
        raise ValueError(f"set_base_model_state_dict: adapters {merged} are merged; call unmerge_adapter() first")
    expected = get_base_model_state_dict(model)
    missing = [name for name in expected if name not in state_dict]
    unexpected = [name for name in state_dict if name not in expected]
    if strict and (missing or unexpected):
        found = {"Missing key(s)": missing, "Unexpected key(s)": unexpected}
        parts = [f"{what} in state_dict: {', '.join(names)}" for what, names in found.items() if names]
        raise RuntimeError(f"the state dict does not fit the base model of {type(model).__name__}. {'. '.join(parts)}")
    nn.Module.load_state_dict(model, {n: t for n, t in state_dict.items() if n in expected}, strict=False)
    return LoadResult(missing, unexpected)


def _added(model: nn.Module) -> tuple[str, ...]:
    """The starts of the names that adapters added to the state dict."""
    found: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        start = f"{path}." if path else ""
        attributes: Any = own_attributes(module) if isinstance(module, AdapterModule) else ()
        found += [f"{start}{name}." for name in attributes]
    return tuple(found)


def one_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of all floating point parameters of the base model; None if they have several, or there are none.

    Packed weights have none, whatever they stand for: it is the dtype in which a dense layer fits the rest.
    """
    parameters = (p for _, module in base_modules(model) for p in module._parameters.values())
    found = {p.dtype for p in parameters if p is not None and p.is_floating_point()}
    return found.pop() if len(found) == 1 else None

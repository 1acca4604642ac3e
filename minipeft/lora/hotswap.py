"""Hot-swapping: the weights of another LoRA adapter in the place of those that are there.

Hot-swapping leaves a compiled model as it is: it goes on without compiling again. `load_adapter` into a name that
exists does this too, when the settings are the same. Here they may differ in r, lora_alpha and use_rslora, and the new
adapter may adapt fewer layers. The rank R and the scaling s of a layer, which its compiled code contains, stay, and the
new factors are fitted: with s' the scaling that they were trained with, s' B' A' = s (s'/s B') A', and rows of zeros in
A' with columns of zeros in B' change nothing. Where R is too small, `prepare_model_for_compiled_hotswap` makes it
larger, before compiling.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.attach import adapter_modules
from minipeft.config import PeftConfig
from minipeft.directory import find_adapter, read_tensors
from minipeft.embeddings import embedding_keys
from minipeft.errors import PeftWarning
from minipeft.hub import hub_arguments
from minipeft.lora.config import LoraConfig, changes_base
from minipeft.lora.conv import LoraConv
from minipeft.lora.layer import LoraLayer
from minipeft.mixins import plain_class
from minipeft.state import adapter_state, key_prefix, load_tensors
from minipeft.targets import ends_with


def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the weights of the LoRA adapter `adapter_name` by those of another adapter (PEFT's function).

    Layers that the new adapter does not adapt act as the base model's. Ranks that are too large for the layers make
    these grow, unless the model is compiled.

    Args:
        model: The model, or what torch.compile made of it.
        model_name_or_path: The new adapter's folder, or its name on the hub.
        torch_device: Accepted for compatibility: the tensors stay where they are.
        kwargs: `subfolder`, and how to reach the hub (`hub.HUB_ARGUMENTS`).

    Raises ValueError when there is no such LoRA adapter, it is merged, or the new one does not fit, FileNotFoundError
        when there is no new one. Nothing is changed then.
    """
    hub = hub_arguments(kwargs)
    directory = find_adapter(model_name_or_path, kwargs.pop("subfolder", None), **hub)
    if kwargs:
        raise TypeError(f"hotswap_adapter() does not take {sorted(kwargs)}")
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"Adapter {adapter_name} does not exist; there are {sorted(configs)}")
    new = _check_alike(configs[adapter_name], PeftConfig.from_pretrained(directory), str(directory))
    _swap(model, adapter_name, read_tensors(directory), new, str(directory))


def hotswap_adapter_from_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, from tensors in memory (PEFT's function).

    Args:
        state_dict: Tensors by their names in the model, with the adapter's (`layer.lora_A.default.weight`), or on disk.
        config: What they were trained under.
        parameter_prefix: Of PEFT's, for finding the adapter's tensors, which know themselves here.
    """
    tensors = {re.sub(rf"\.{adapter_name}(?=\.|$)", "", name): tensor for name, tensor in state_dict.items()}
    _swap(model, adapter_name, tensors, config, "the given state dict")


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make room for adapters of other ranks: pad the factors of all LoRA adapters with zeros (PEFT's function).

    The output stays the same, and so do the scalings, which need no preparing: see the module. The configs in the
    model say the new ranks, with a lora_alpha that leaves the scalings as they are.

    Args:
        target_rank: The largest rank that will be swapped in; None changes nothing.
        config: Further configs that are to say so.
        check_compiled: "error", "warn" or "ignore": what to do about a model that is compiled already.

    Raises ValueError for a compiled model unless told otherwise, a model without LoRA, a rank that is smaller than one
        that is there, or no multiple of a convolution's groups.
    """
    if is_compiled(model):
        _complain(check_compiled)
    model = getattr(model, "_orig_mod", model)
    layers = [(path, m) for path, m in adapter_modules(model) if isinstance(m, LoraLayer) and m.scaling]
    if not layers:
        raise ValueError("No adapter layers found on the model: there is no LoRA to make room for")
    if target_rank is None:
        return
    for path, layer in layers:
        _check_growth(layer, path, target_rank)
    given = [*config.values()] if isinstance(config, Mapping) else [config] if config is not None else []
    own = {id(one): one for one in (*getattr(model, "peft_config", {}).values(), *given)}
    for one in own.values():
        if isinstance(one, LoraConfig):
            _say_rank(one, [path for path, _ in layers], target_rank)
    for _, layer in layers:
        for adapter in layer.scaling:
            _install(layer, adapter, _padded(layer, layer.factors(adapter), target_rank))


def is_compiled(model: Any) -> bool:
    """True for what torch.compile made, and a module that, or in which one, was compiled in place."""
    return hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())


def _complain(check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        )
    if check_compiled == "error":
        raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if check_compiled == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled; it will be compiled "
            "again. Call the function *before* compiling the model",
            PeftWarning,
            stacklevel=3,
        )


def _swap(model: Any, adapter: str, stored: Mapping[str, Tensor], new: LoraConfig, source: str) -> None:
    """Put the tensors `stored`, trained under `new`, into `adapter`: all of them or, on an error, none."""
    compiled = is_compiled(model)
    model = getattr(model, "_orig_mod", model)
    layers = []
    for path, layer in adapter_modules(model):
        if adapter in layer.merged_adapters:
            raise ValueError(f"adapter {adapter!r} is merged: call unmerge_adapter() before new weights replace it")
        if isinstance(layer, LoraLayer) and layer.adapts(adapter):
            layers.append((path, layer))
    if not layers:
        raise ValueError(f"{source}: adapter {adapter!r} has no LoRA on a layer, so there is nothing to swap")
    ranks = {path: new.settings_for(path)[0] for path, _ in layers}
    growing = any(layer.r[adapter] < ranks[path] for path, layer in layers)
    # All layers grow to the same rank, which the config can say in one number.
    rank = max(*ranks.values(), *(layer.r[adapter] for _, layer in layers))
    for path, layer in layers if growing else ():
        _check_growth(layer, path, rank, adapter)
        if compiled:
            raise ValueError(
                f"{path}: the new adapter has r={ranks[path]}, and the compiled model room for {layer.r[adapter]}; "
                "call prepare_model_for_compiled_hotswap(model, target_rank=...) before compiling"
            )
    prefix = key_prefix(model, adapter)
    live, fitted = adapter_state(model, adapter, prefix), dict(stored)
    grown = []
    on_disk = {id(tensor): name for name, tensor in live.items()}
    for path, layer in layers:
        names = _names_of(layer, adapter, on_disk)
        room = rank if growing else layer.r[adapter]
        _fit(fitted, layer, adapter, path, new, names, room)
        if growing:
            factors = _padded(layer, layer.factors(adapter), rank)
            live |= dict(zip(names[:2], factors, strict=True))
            grown.append((layer, factors))
    load_tensors(live, fitted, source, embedding_keys(model, adapter, prefix))
    if growing and adapter in getattr(model, "peft_config", {}):
        _say_rank(model.peft_config[adapter], [path for path, _ in layers], rank)
    for layer, factors in grown:
        _install(layer, adapter, factors)


def _check_alike(here: Any, new: Any, source: str) -> LoraConfig:
    if not isinstance(here, LoraConfig) or not isinstance(new, LoraConfig):
        raise ValueError(
            f"{source}: LoRA adapters can be hot-swapped, not {type(here).__name__} by {type(new).__name__}"
        )
    if here.target_parameters or new.target_parameters:
        raise ValueError(f"{source}: adapters with target_parameters are not hot-swapped; load_adapter does it")
    for field in ("use_dora", "bias", "lora_bias"):
        if getattr(here, field) != getattr(new, field):
            raise ValueError(f"{source}: {field} is {getattr(new, field)!r}, expected {getattr(here, field)!r}")
    kinds = (here.init_lora_weights, new.init_lora_weights)
    if any(changes_base(kind) for kind in kinds):
        raise ValueError(f"{source}: adapters that change the base are not hot-swapped, init_lora_weights is {kinds}")
    return new


def _names_of(layer: LoraLayer, adapter: str, on_disk: dict[int, str]) -> list[str]:
    """The names of A and B on disk, and of B's bias if it has one, out of those of all tensors by id."""
    bias = [layer.lora_B[adapter].bias] if layer.lora_bias[adapter] else []
    return [on_disk[id(tensor)] for tensor in (*layer.factors(adapter), *bias)]


def _fit(
    tensors: dict[str, Tensor], layer: LoraLayer, adapter: str, path: str, new: LoraConfig, names: list[str], room: int
) -> None:
    """Fit the factors in `tensors` for the layer at `path`, trained under `new`, to `room` ranks and its scaling.

    Zeros, if the new adapter does not adapt this layer.

    Args:
        names: `_names_of` the layer.
    """
    there = [name in tensors for name in names]
    if not any(there) and not _surely_adapts(new, path):
        shapes = [*_padded(layer, layer.factors(adapter), room), *(layer.lora_B[adapter].bias for _ in names[2:])]
        tensors.update({name: torch.zeros_like(like) for name, like in zip(names, shapes, strict=True)})
    # `load_tensors` raises for tensors that are missing, naming them.
    if all(there):
        times = new.settings_for(path)[2] / layer.scaling[adapter]
        lora_A, lora_B = _padded(layer, (tensors[names[0]], tensors[names[1]]), room)
        tensors.update({names[0]: lora_A, names[1]: lora_B * times})
        tensors.update({name: tensors[name] * times for name in names[2:]})


def _surely_adapts(config: LoraConfig, path: str) -> bool:
    """True if the layer at `path` is named in the config's targets, and nothing can have taken it out again."""
    targets = config.target_modules
    plain = not config.exclude_modules and config.layers_to_transform is None
    return plain and isinstance(targets, set) and any(ends_with(path, target) for target in targets)


# Larger ranks


def _check_growth(layer: LoraLayer, path: str, rank: int, adapter: str | None = None) -> None:
    """Raise ValueError if the factors of these adapters (all by default) cannot have `rank` ranks."""
    largest = max(layer.r[name] for name in layer.scaling if adapter in (None, name))
    if largest > rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({largest}): {path}"
        )
    groups = _groups(layer)
    if rank % groups:
        raise ValueError(
            f"Trying to pad a {plain_class(layer).__name__} LoRA adapter with groups={groups} to target rank {rank}, "
            f"but the target rank is not divisible by {groups}. Please choose a target rank that is divisible by "
            f"{groups}. It is {path!r}"
        )


def _groups(layer: Any) -> int:
    return layer.groups if isinstance(layer, LoraConv) else 1


def _padded(layer: LoraLayer, factors: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """A and B with zeros up to `rank` ranks; in a convolution in groups each group's ranks lie together."""
    lora_A, lora_B = (factor.detach() for factor in factors)
    groups = _groups(layer)
    own = rank // groups
    missing = own - len(lora_A) // groups
    if missing <= 0:
        return lora_A.clone(), lora_B.clone()
    grouped = lora_A.unflatten(0, (groups, -1))
    more_A = lora_A.new_zeros(groups, missing, *lora_A.shape[1:])
    more_B = lora_B.new_zeros(len(lora_B), missing, *lora_B.shape[2:])
    return torch.cat((grouped, more_A), 1).flatten(0, 1), torch.cat((lora_B, more_B), 1)


def _install(layer: LoraLayer, adapter: str, factors: tuple[Tensor, Tensor]) -> None:
    """Put larger factors in the places of those that are there."""
    rank = len(factors[0])
    for old, new in zip(layer.factors(adapter), factors, strict=True):
        assert isinstance(old, nn.Parameter)
        old.data = new.to(old)
    for holder, name in ((layer.lora_A, "out"), (layer.lora_B, "in")) if adapter in layer.lora_A else ():
        for field in (f"{name}_features", f"{name}_channels"):
            if hasattr(holder[adapter], field):
                setattr(holder[adapter], field, rank)
    root = math.sqrt(rank) if layer.use_rslora[adapter] else rank
    layer.r[adapter], layer.lora_alpha[adapter] = rank, layer.scaling[adapter] * root


def _say_rank(config: LoraConfig, paths: list[str], rank: int) -> None:
    """Let `config` say that the layers at `paths` have `rank` ranks, and the scalings that they have now."""
    scalings = {path: config.settings_for(path)[2] for path in paths}
    root = [math.sqrt(number) if config.use_rslora else number for number in (rank, config.r)]
    config.lora_alpha *= root[0] / root[1]
    config.r, config.rank_pattern, config.alpha_pattern = rank, dict.fromkeys(config.rank_pattern, rank), {}
    others = {path: scaling for path, scaling in scalings.items() if config.settings_for(path)[2] != scaling}
    config.alpha_pattern = {path: scaling * root[0] for path, scaling in others.items()}

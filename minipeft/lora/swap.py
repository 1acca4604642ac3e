"""New weights for an adapter that is there, in place: a compiled model goes on without compiling again.

`load_adapter` into a name that exists does this too, when the settings are the same. Here they may differ in
lora_alpha, use_rslora and, downwards, in r: what a layer's compiled code has in it, its rank and its scaling s, stays,
and the new factors are fitted to it: with s' the scaling that they were trained with, s' B' A' = s (s'/s B') A', and
rows of zeros in A' with columns of zeros in B' change nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from minipeft import saving
from minipeft.attach import adapter_modules
from minipeft.config import PeftConfig
from minipeft.lora.config import LoraConfig, changes_base
from minipeft.lora.layer import LoraLayer
from minipeft.state import fill_adapter


def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the weights of the LoRA adapter `adapter_name` by those in a directory (PEFT's function).

    Args:
        torch_device: Accepted for compatibility: the tensors stay where they are.
        kwargs: `subfolder` of the directory.

    Raises ValueError when there is no such LoRA adapter, it is merged, or the new one does not fit, FileNotFoundError
        when there is no new one. Nothing is changed then.
    """
    directory = Path(model_name_or_path) / (kwargs.pop("subfolder", None) or "")
    if kwargs:
        raise TypeError(f"hotswap_adapter() does not take {sorted(kwargs)}")
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter called {adapter_name!r}; there are {sorted(model.peft_config)}")
    here, new = model.peft_config[adapter_name], PeftConfig.from_pretrained(directory)
    _check_alike(here, new, str(directory))
    tensors = saving.read_tensors(directory)
    for path, layer in adapter_modules(model):
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} is merged: call unmerge_adapter() before new weights replace it"
            )
        if isinstance(layer, LoraLayer) and layer.adapts(adapter_name):
            assert isinstance(new, LoraConfig)
            _fit(tensors, layer, adapter_name, path, new, here.key_prefix)
    fill_adapter(model, adapter_name, tensors, str(directory))


def _check_alike(here: Any, new: Any, source: str) -> None:
    if not isinstance(here, LoraConfig) or not isinstance(new, LoraConfig):
        raise ValueError(
            f"{source}: LoRA adapters can be hot-swapped, not {type(here).__name__} by {type(new).__name__}"
        )
    if here.target_parameters or new.target_parameters:
        raise ValueError(f"{source}: adapters with target_parameters are not hot-swapped; load_adapter does it")
    for field in ("use_dora", "bias"):
        if getattr(here, field) != getattr(new, field):
            raise ValueError(f"{source}: {field} is {getattr(new, field)!r}, expected {getattr(here, field)!r}")
    kinds = (here.init_lora_weights, new.init_lora_weights)
    if any(changes_base(kind) for kind in kinds):
        raise ValueError(f"{source}: adapters that change the base are not hot-swapped, init_lora_weights is {kinds}")


def _fit(tensors: dict[str, Tensor], layer: LoraLayer, adapter: str, path: str, new: LoraConfig, prefix: str) -> None:
    """Fit the factors in `tensors` for the layer at `path`, trained under `new`, to its rank and scaling."""
    rank, _, scaling = new.settings_for(path)
    missing = layer.r[adapter] - rank
    if missing < 0:
        raise ValueError(
            f"{path}: the new adapter has r={rank}, more than the {layer.r[adapter]} that there is room for"
        )
    names = {id(tensor): f"{prefix}{path}.{name}" for name, tensor in layer.adapter_state(adapter).items()}
    name_A, name_B = (names[id(factor)] for factor in layer.factors(adapter))
    # What is not there is for `fill_adapter` to name.
    if name_A in tensors and name_B in tensors:
        tensors[name_A] = F.pad(tensors[name_A], (0, 0, 0, missing))
        tensors[name_B] = F.pad(tensors[name_B], (0, missing)) * (scaling / layer.scaling[adapter])

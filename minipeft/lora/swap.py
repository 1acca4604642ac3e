"""New weights for a LoRA adapter that is there, in place: another adapter's, or LoftQ's start over a packed base.

Hot-swapping leaves a compiled model as it is: it goes on without compiling again. `load_adapter` into a name that
exists does this too, when the settings are the same. Here they may differ in lora_alpha, use_rslora and, downwards, in
r: the rank and the scaling s of a layer, which its compiled code contains, stay, and the new factors are fitted. With
s' the scaling that they were trained with, s' B' A' = s (s'/s B') A', and rows of zeros in A' with columns of zeros in
B' change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from minipeft.attach import adapter_modules, base_name
from minipeft.config import PeftConfig
from minipeft.directory import find_adapter, read_tensors
from minipeft.hub import hub_arguments
from minipeft.lora.config import LoraConfig, changes_base
from minipeft.lora.layer import LoraLayer
from minipeft.lora.layers import LoraNF4Linear
from minipeft.lora.variants import leading_factors
from minipeft.state import fill_adapter


def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the weights of the LoRA adapter `adapter_name` by those in a directory (PEFT's function).

    Args:
        torch_device: Accepted for compatibility: the tensors stay where they are.
        kwargs: `subfolder`, and how to reach the hub (`hub.HUB_ARGUMENTS`).

    Raises ValueError when there is no such LoRA adapter, it is merged, or the new one does not fit, FileNotFoundError
        when there is no new one. Nothing is changed then.
    """
    hub = hub_arguments(kwargs)
    directory = find_adapter(model_name_or_path, kwargs.pop("subfolder", None), **hub)
    if kwargs:
        raise TypeError(f"hotswap_adapter() does not take {sorted(kwargs)}")
    if adapter_name not in model.peft_config:
        raise ValueError(f"Adapter {adapter_name} does not exist; there are {sorted(model.peft_config)}")
    here, new = model.peft_config[adapter_name], PeftConfig.from_pretrained(directory)
    _check_alike(here, new, str(directory))
    tensors = read_tensors(directory)
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
    # `fill_adapter` raises for tensors that are missing, naming them.
    if name_A in tensors and name_B in tensors:
        tensors[name_A] = F.pad(tensors[name_A], (0, 0, 0, missing))
        tensors[name_B] = F.pad(tensors[name_B], (0, missing)) * (scaling / layer.scaling[adapter])


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Let a LoRA adapter over NF4 layers start from the error of their quantization (LoftQ with one round).

    A and B become the leading components of W - Q, Q being the layer's packed weight, which stays as it is.

    Args:
        model_path: Folder with W, the weights before quantization, in safetensors; by default the model's own.
        callback: Called as callback(peft_model, name of a layer) after each layer; False undoes that layer's change.

    Raises FileNotFoundError when there is no such folder, ValueError when it lacks a weight, or no layer of the adapter
        is packed.
    """
    layers = [
        (path, layer)
        for path, layer in adapter_modules(peft_model)
        if isinstance(layer, LoraNF4Linear) and layer.adapts(adapter_name)
    ]
    if not layers:
        raise ValueError(f"replace_lora_weights_loftq: adapter {adapter_name!r} has no LoRA on an NF4 layer")
    weights = _Weights(model_path or base_name(peft_model))
    for path, layer in layers:
        quantized = layer.dense_weight()
        lost = weights[f"{path}.weight"].to(quantized) - quantized
        factors = layer.factors(adapter_name)
        before = [factor.clone() for factor in factors]
        new = leading_factors(lost, layer.r[adapter_name], layer.scaling[adapter_name])
        _set(factors, new)
        if callback is not None and not callback(peft_model, path):
            _set(factors, before)


def _set(factors: Any, values: Any) -> None:
    for factor, value in zip(factors, values, strict=True):
        factor.data.copy_(value)


class _Weights:
    """The tensors of a folder's safetensors files by name, read when they are asked for."""

    def __init__(self, folder: str | Path | None) -> None:
        files = sorted(Path(folder).glob("*.safetensors")) if folder is not None else []
        if not files:
            raise FileNotFoundError(
                f"no safetensors files at {str(folder)!r}: give model_path, the plain model's folder"
            )
        self.folder, self.file_of = folder, {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                self.file_of.update(dict.fromkeys(tensors.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.file_of:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        with safe_open(self.file_of[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        if not tensor.is_floating_point():
            raise ValueError(
                f"{self.folder}: {name!r} is packed already ({tensor.dtype}); the weights before are needed"
            )
        return tensor

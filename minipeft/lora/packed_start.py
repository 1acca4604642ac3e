"""LoftQ's start (Li et al. 2023) for a LoRA adapter over a base that is packed already, which stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minipeft.attach import adapter_modules, base_name
from minipeft.errors import PeftWarning
from minipeft.experts import packed
from minipeft.lora.layers import LoraNF4Linear
from minipeft.lora.variants import leading_factors


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

    A warning names packed experts, whose LoRA keeps its start.

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
    experts = [
        f"{path}.{name}"
        for path, module in adapter_modules(peft_model)
        for name in module.parameter_targets(adapter_name)
        if packed(module, name) is not None
    ]
    if experts:
        warnings.warn(
            f"replace_lora_weights_loftq: {len(experts)} stacks of packed experts keep their start, such as "
            f"{experts[0]}: it is for layers",
            PeftWarning,
            stacklevel=2,
        )
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

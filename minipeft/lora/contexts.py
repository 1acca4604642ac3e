"""Blocks in which LoRA acts otherwise: with other scalings, or faster (PEFT's context managers of these names)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from minipeft.copies import Replaced
from minipeft.lora.experts import ExpertFactors
from minipeft.lora.layer import LoraLayer
from minipeft.lora.variants import Dora


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the block all LoRA updates of `model` are `multiplier` times as large.

    Between 0 and 1 this goes from the base model to the adapted one. What is merged inside the block stays merged so.

    Raises TypeError when `multiplier` is no number, ValueError for a model without LoRA.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, float | int):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = [module for module in model.modules() if isinstance(module, ExpertFactors)]
    if not layers and not factors:
        raise ValueError(f"scaling is only supported for models with `LoraLayer`s, {type(model).__name__} has none")
    before = [layer.scaling for layer in layers]
    before_factors = [factor.scaling for factor in factors]
    try:
        for layer in layers:
            layer.scaling = {adapter: scaling * multiplier for adapter, scaling in layer.scaling.items()}
        for factor in factors:
            factor.scaling *= multiplier
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            # Unloaded inside the block, it is a plain layer.
            if isinstance(layer, LoraLayer):
                layer.scaling = scaling
        for factor, one in zip(factors, before_factors, strict=True):
            factor.scaling = one


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside the block the inputs of adapted layers keep their dtype (PEFT's context, for hooks that cast weights).

    Of LoRA's updates they do so outside of it, too, where PEFT casts them to the factors' dtype: the product is in the
    wider of the two. Inputs of a module that is trained whole are cast to its copy's dtype, but inside the block.

    Args:
        active: False for a block without effect.
    """
    whole = [module for module in model.modules() if isinstance(module, Replaced)] if active else []
    before = [module.casts for module in whole]
    try:
        for module in whole:
            vars(module)["casts"] = False
        yield
    finally:
        for module, casts in zip(whole, before, strict=True):
            vars(module)["casts"] = casts


class DoraCaching:
    """Inside the block DoRA in eval mode computes |W0 + D| once, not at every call, at the price of keeping it.

    `DoraCaching()(enabled=True)` does so until `DoraCaching()(enabled=False)`.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(Dora.caching)
        Dora.caching = self.enabled

    def __exit__(self, *error: object) -> None:
        Dora.caching = self._before.pop()

    def __call__(self, enabled: bool = True) -> None:
        Dora.caching = enabled

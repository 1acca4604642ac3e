"""What `PeftModel` can do with LoRA adapters alone: combine them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minipeft.methods.lora import LoraLayer
from minipeft.methods.lora_combine import Combination, combine_layer, combined_config
from minipeft.methods.lora_config import LoraConfig
from minipeft.methods.matching import shortest_names
from minipeft.patching import adapter_modules

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class LoraModel(_Base):
    """The calls that only LoRA adapters answer (mixed into `PeftModel`)."""

    if TYPE_CHECKING:
        peft_config: dict[str, Any]
        _attach: Any
        _config_of: Any
        _set_trainable: Any

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        generator: torch.Generator | None = None,
    ) -> None:
        """Add a LoRA adapter that is the weighted combination of others (PEFT's method); it is frozen and not active.

        Args:
            weights: One for each of `adapters`; may be negative.
            combination_type: See `methods/lora_combine.py`; a single adapter is scaled, whatever is said here.
            svd_full_matrices: Accepted for compatibility: what it adds would be cut off again.
            generator: What "dare" draws from (not PEFT's).
            svd_rank, svd_clamp, svd_driver, density, majority_sign_method: See `Combination`.

        Raises ValueError for a name that is taken, unknown adapters, adapters of other methods or that also train
            tensors whole (biases, modules_to_save) or lengths (DoRA), and for arguments that do not go together.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter called {adapter_name!r} already; delete it or take another name")
        if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
            raise ValueError(f"adapters must be different names with a weight each, got {adapters} and {weights}")
        kind = combination_type if len(adapters) > 1 else "linear"
        how = Combination(kind, svd_rank, svd_clamp, svd_driver, density, majority_sign_method, generator)
        configs = {adapter: self._config_of(adapter) for adapter in adapters}
        layers = self._layers_to_combine(configs)
        paths = shortest_names(self, list(layers))
        self._attach(adapter_name, combined_config(layers, configs, how, paths), True, init=False)
        for layer in layers.values():
            new = combine_layer(layer, dict(zip(adapters, weights, strict=True)), layer.r[adapter_name], how)
            for factor, value in zip(layer.factors(adapter_name), new, strict=True):
                factor.data.copy_(value)
        self._set_trainable(adapter_name, False)

    def _layers_to_combine(self, configs: dict[str, Any]) -> dict[str, LoraLayer]:
        """The layers, by dotted name, that at least one of the adapters has an update in."""
        for name, config in configs.items():
            if not isinstance(config, LoraConfig):
                raise ValueError(f"adapter {name!r} is no LoRA adapter ({type(config).__name__}): only those combine")
            if config.use_dora:
                raise ValueError(f"adapter {name!r} cannot be combined: DoRA's update is not linear in its tensors")
        layers = {}
        for path, module in adapter_modules(self):
            for name in configs:
                whole = module.replaced_tensors(name)
                if whole:
                    raise ValueError(f"adapter {name!r} cannot be combined: it trains {path}.{whole[0]} whole")
            if isinstance(module, LoraLayer) and any(module.adapts(name) for name in configs):
                layers[path] = module
        return layers

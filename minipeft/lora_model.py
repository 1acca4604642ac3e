"""What `PeftModel` can do with LoRA adapters alone: combine them, and send the rows of a batch through several."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minipeft.attach import adapter_modules
from minipeft.lora.combine import Combination, combine_layer, combined_config
from minipeft.lora.config import LoraConfig
from minipeft.lora.init import is_pissa
from minipeft.lora.layer import LoraLayer
from minipeft.lora.rows import BASE_ROW, RowAdapters
from minipeft.targets import shortest_names

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
        _switch: Any

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As the plain model's.

        Args:
            adapter_names: The LoRA adapter that each row of the batch goes through, "__base__" for none; for this call
                they stand in the place of the adapters that act. Inference only, as in PEFT.

        Raises ValueError for adapters that are unknown, of another method, merged, or that replace base tensors
            (biases, modules_to_save); for another number of names than rows; and in training mode.
        """
        # Not `forward`: its signature must stay the plain model's, since Trainer and `generate` read it.
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        with self._by_row(adapter_names):
            return super().__call__(*args, **kwargs)

    @property
    def generate(self) -> Callable[..., Any]:
        """`generate` of the plain model, if it has one, which then takes `adapter_names` as a call does.

        Beams and several sequences a prompt go through their prompt's adapter.
        """
        plain = super().generate  # type: ignore[misc]

        @functools.wraps(plain)
        def generate(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
            if adapter_names is None:
                return plain(*args, **kwargs)
            with self._by_row(adapter_names, repeated=True):
                return plain(*args, **kwargs)

        return generate

    @contextlib.contextmanager
    def _by_row(self, names: Sequence[str], repeated: bool = False) -> Iterator[None]:
        """Inside, each row of a batch goes through the adapter called as `names` says."""
        if isinstance(names, str) or not names:
            raise ValueError(f"adapter_names must be a list with one name for each row of the batch, got {names!r}")
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first")
        for name in dict.fromkeys(names):
            config = None if name == BASE_ROW else self._config_of(name)
            if config is not None and not isinstance(config, LoraConfig):
                raise ValueError(f"adapter_names: {name!r} is no LoRA adapter ({type(config).__name__})")
            if getattr(config, "init_lora_weights", None) == "loftq":
                raise ValueError(f"adapter_names: {name!r} is LoftQ: it replaces the base weight for the whole batch")
            whole = [
                f
                for f in ("bias", "modules_to_save", "target_parameters")
                if getattr(config, f, None) not in (None, [], "none")
            ]
            if whole:
                raise ValueError(f"adapter_names: {name!r} has {whole[0]}: tensors of its own for the whole batch")
        before, self._switch.by_row = self._switch.by_row, RowAdapters(names, repeated)
        try:
            yield
        finally:
            self._switch.by_row = before

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
        layers = self._layers_to_combine(configs, how)
        paths = shortest_names(self, list(layers))
        self._attach(adapter_name, combined_config(layers, configs, how, paths), True, init=False)
        for layer in layers.values():
            new = combine_layer(layer, dict(zip(adapters, weights, strict=True)), layer.r[adapter_name], how)
            for factor, value in zip(layer.factors(adapter_name), new, strict=True):
                factor.data.copy_(value)
        self._set_trainable(adapter_name, False)

    def _layers_to_combine(self, configs: dict[str, Any], how: Combination) -> dict[str, LoraLayer]:
        """The layers, by dotted name, that at least one of the adapters has an update in."""
        for name, config in configs.items():
            if not isinstance(config, LoraConfig):
                raise ValueError(f"adapter {name!r} is no LoRA adapter ({type(config).__name__}): only those combine")
            if is_pissa(config.init_lora_weights) and not how.kind.endswith("svd"):
                raise ValueError(
                    f"adapter {name!r} is PiSSA: combination_type {how.kind!r} adds up factors and would leave out "
                    "what it started from; take 'svd'"
                )
            if config.target_parameters:
                raise ValueError(f"adapter {name!r} cannot be combined: it has target_parameters")
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

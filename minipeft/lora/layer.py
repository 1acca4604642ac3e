"""LoRA: h = W0 x + b + s B A dropout(x), with W0 frozen (Hu et al. 2021, section 4.1).

rsLoRA (Kalajdzievski 2023) scales by alpha / sqrt(r) instead of alpha / r.

A target is adapted in place: the mixin `LoraLayer` goes in front of its class (see `adapter.py`), so `q_proj` stays the
module it was, `q_proj.weight` keeps its name, and the adapter lies beside it as `q_proj.lora_A.<adapter>.weight`.
`store.py` holds these tensors, `variants.py` has the updates that are more than LoRA's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.lora.config import LoraConfig
from minipeft.lora.own_forward import unchanged
from minipeft.lora.rows import add_row_updates, check_unmerged, rows_through
from minipeft.lora.store import AdapterStore
from minipeft.lora.variants import init_factors, variant_for, wide
from minipeft_kernels.linear.low_rank import Lora
from minipeft_kernels.linear.op import linear
from minipeft_kernels.linear.shorthands import lora_update
from minipeft_kernels.packed import Weight


class LoraLayer(AdapterStore):
    """A layer with low-rank updates. A subclass says how its weight lies, and how it is multiplied."""

    name_prefix: ClassVar[str] = "Lora"
    _own_attributes: ClassVar[tuple[str, ...]] = ("_is_plain",)

    # The classes whose forward computes W0 x + b and nothing else, so that one operation may stand for it.
    plain_classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    # The dtype of the product with W0; None for x's. A packed layer may have another.
    compute_dtype: torch.dtype | None = None

    _is_plain: bool

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        self._is_plain = self._computes_plainly()

    def add_adapter(self, adapter: str, config: LoraConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        """Create the tensors of `adapter`, in `dtype`; left uninitialized when `init` is false (for loading)."""
        r, alpha, scaling = config.settings_for(path)
        if config.lora_dropout:
            self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout).train(self.training)
        self.r[adapter], self.lora_alpha[adapter], self.scaling[adapter] = r, alpha, scaling
        for name in ("use_dora", "use_rslora", "lora_bias"):
            vars(self)[name][adapter] = getattr(config, name)
        self._create_factors(adapter, r, dtype)
        self.variants[adapter] = variant_for(config)
        self.variants[adapter].start(self, adapter, config, dtype, init)
        if config.bias != "none" and self._parameters.get("bias") is not None:
            self.train_bias(adapter, dtype)

    # The formula

    @classmethod
    def check(cls, module: nn.Module, path: str, config: LoraConfig) -> None:
        """Raise ValueError if `config` asks for what a layer like `module`, which is at `path`, cannot have."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """h = W0 x + b + s B A dropout(x), with one update for each adapter that acts.

        (..., in_features) -> (..., out_features), in the dtype of the layer's own output. While adapters are merged,
        W0 holds their updates.

        Raises ValueError if the rows of a batch are to go through adapters of their own while others are merged.
        """
        if "adapter_names" in kwargs:
            return rows_through(self, kwargs.pop("adapter_names"), x, *args, **kwargs)
        # `self.bias` is the acting adapter's bias if it trains one, else the layer's own (`biases.TrainedBias`).
        weight = None if args or kwargs else self.frozen_weight(x)
        one = None if weight is None else self.one_plain_adapter()
        if one is not None:  # no dropout, no variant: base and update in one operation
            return linear(x, weight, self.bias, one, self.compute_dtype)
        base = self.base_output(x, *args, **kwargs)
        if not isinstance(base, Tensor):
            return unchanged(self, base)
        if self.switch.rows is not None:
            check_unmerged(self.merged_adapters)
            return add_row_updates(self, self.switch.rows, x, base)
        out = base
        for adapter in self.acting():
            out = self.variants[adapter].apply(self, adapter, x, base, out)  # plain: out + s B A dropout(x)
        return out

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W0 x + b: the output of the layer's own forward. While a LoftQ adapter acts, its own weight stands for W0."""
        own = [adapter for adapter in self.acting() if adapter in self.lora_base] if self.lora_base else []
        if not own:
            return super().forward(x, *args, **kwargs)
        out: Tensor = self.lora_base[own[0]](x)
        return out if self.bias is None else (out + self.bias).to(out.dtype)

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """s B A dropout(x): (..., in_features) -> (..., out_features), in the wider of x's and the factors' dtypes."""
        x = x if (dropout := self.dropout_of(adapter)) is None else dropout(x)
        if self.is_watched(adapter):
            return self.called_update(adapter, x)
        return lora_update(x, *self.factors(adapter), self.scaling[adapter])

    def acting(self) -> list[str]:
        """The adapters whose updates are added to the base output now."""
        return [] if self.merged_adapters else [adapter for adapter in self.switch.acting if adapter in self.scaling]

    def one_plain_adapter(self) -> Lora | None:
        """A, B and s of the adapter that acts, if it is one alone, without a variant, and on the same x as W0."""
        acting = self.acting()
        if len(acting) != 1 or not self.variants[acting[0]].fuses or self.is_watched(acting[0]):
            return None
        if (dropout := self.dropout_of(acting[0])) is not None and dropout.training:
            return None
        return (*self.factors(acting[0]), self.scaling[acting[0]])

    def frozen_weight(self, x: Tensor) -> Weight | None:
        """W0 (out_features, in_features), dense or packed, for an operation that stands for the layer's own forward.

        None if that forward must be called: it is a subclass's own, W0 is trained, or x has another dtype.
        """
        return None

    def _computes_plainly(self) -> bool:
        """True if the forward behind this mixin is that of a plain class, and no other mixin's or subclass's."""
        return self._class_behind() in self.plain_classes

    def _class_behind(self) -> type | None:
        """The class that has the layer's own forward: the first one behind this mixin with a forward."""
        classes = type(self).__mro__
        return next((cls for cls in classes[classes.index(LoraLayer) + 1 :] if "forward" in vars(cls)), None)

    # Merging

    @torch.no_grad()
    def delta_weight(self, adapter: str) -> Tensor:
        """(out_features, in_features), in float32 at least: the change of the weight by merging `adapter`."""
        return self.variants[adapter].delta(self, adapter)

    def merged_weight(self, adapters: tuple[str, ...]) -> Tensor:
        """(out_features, in_features), in float32 at least: the base weight with the updates of `adapters` added."""
        own = next((adapter for adapter in adapters if adapter in self.lora_base), None)
        weight = self.dense_weight().clone() if own is None else self.lora_base[own].dequantize(torch.float32)
        for adapter in adapters:
            if self.adapts(adapter):
                weight += self.delta_weight(adapter)
        return weight

    @torch.no_grad()
    def merged_bias(self, adapters: tuple[str, ...]) -> Tensor | None:
        """(out_features,), in float32 at least: the base bias with those of B added; None if no B has one."""
        added = [self.variants[adapter].bias_delta(self, adapter) for adapter in adapters if self.adapts(adapter)]
        base = self._parameters.get("bias")
        own = [delta for delta in added if delta is not None]
        return None if base is None or not own else sum(own, start=wide(base))

    def unmergeable(self, adapters: tuple[str, ...]) -> str | None:
        if self._parameters.get("bias") is None and any(self.lora_bias.get(adapter) for adapter in adapters):
            return "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"
        if self.weight_name not in self._parameters and any(self.adapts(adapter) for adapter in adapters):
            return "its weight is no parameter of its own now, but parametrized or sharded"
        return super().unmergeable(adapters)

    def merged_finite(self, adapters: tuple[str, ...]) -> bool:
        merged = (self.merged_weight(adapters), self.merged_bias(adapters))
        return all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in merged)

    def fold(self, adapters: tuple[str, ...]) -> None:
        if not any(self.adapts(adapter) for adapter in adapters):
            super().fold(adapters)
            return
        merged = self.merged_weight(adapters)
        super().fold(adapters)
        self._install_weight(merged)
        # Last, since an adapter may have replaced the base bias just now.
        bias, base = self.merged_bias(adapters), self._parameters.get("bias")
        if bias is not None and base is not None:
            self._install("bias", bias.to(base.dtype))

    def dense_weight(self) -> Tensor:
        """(out_features, in_features), in float32 at least: the base weight."""
        raise NotImplementedError

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(out_features, in_features) as the layer's weight lies."""
        raise NotImplementedError

    def _install_weight(self, weight: Tensor) -> None:
        self._install(self.weight_name, self.as_weight(weight).contiguous().to(self.base_weight().dtype))

    # Files

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        bias = super().adapter_state(adapter)
        if not self.adapts(adapter):
            return bias
        state = {**self._factor_state(adapter), **self.variants[adapter].state(self, adapter)}
        # PEFT wraps the modules that it adapts, and this name is what the wrapping leaves in its files.
        return {**state, **{f"base_layer.{name}": tensor for name, tensor in bias.items()}}

    def plain_state(self, adapter: str, values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        state = super().plain_state(adapter, values)
        return self.variants[adapter].plain_state(self, adapter, state) if self.adapts(adapter) else state

    def stored_as(self, adapter: str) -> str:
        return "base_layer.weight" if self.adapts(adapter) else super().stored_as(adapter)

    def stored_beside(self, adapter: str) -> bool:
        return self.adapts(adapter)

    def replaced_tensors(self, adapter: str) -> list[str]:
        return [*super().replaced_tensors(adapter), *(["weight"] if adapter in self.lora_base else [])]

    def _factor_state(self, adapter: str) -> dict[str, Tensor]:
        lora_A, lora_B = self.factors(adapter)
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}

    def _init_factors(self, adapter: str, kind: bool | str) -> None:
        init_factors(*self.factors(adapter), kind)

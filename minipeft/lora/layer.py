"""LoRA: h = W0 x + s B A dropout(x), with W0 frozen (Hu et al. 2021, section 4.1), and two of its variants.

rsLoRA (Kalajdzievski 2023) scales by alpha / sqrt(r) instead of alpha / r. DoRA (Liu et al. 2024) splits the adapted
weight into a direction and a learned length per output feature.

A target is adapted in place: the mixin `LoraLayer` goes in front of its class (see `base.py`), so `q_proj` stays the
module it was, `q_proj.weight` keeps its name, and the adapter lies beside it as `q_proj.lora_A.<adapter>.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.copies import TrainedBias
from minipeft.lora.config import LoraConfig, is_pissa
from minipeft.lora.init import init_factors, pissa_start
from minipeft.lora.loftq import LoftqBase, LoftQConfig, loftq
from minipeft.lora.rows import add_row_updates
from minipeft_kernels.linear.shorthands import lora_update


class LoraLayer(TrainedBias):
    """What the adapted layers share. A subclass says how it applies A and B and how its weight lies.

    Attributes (all keyed by adapter name, as in PEFT):
        lora_A, lora_B: the factors, (r, in_features) and (out_features, r).
        lora_dropout: applied to the update's input; `nn.Identity` for adapters without dropout.
        lora_magnitude_vector: (out_features,), DoRA's m; only for adapters that use it.
        lora_start: what is subtracted from the base; only for adapters that start as PiSSA (see `lora_init.py`).
        lora_base: what acts in the place of the base weight; only for adapters that start as LoftQ (see `loftq.py`).
        r, lora_alpha, scaling: the numbers.
    """

    name_prefix: ClassVar[str] = "Lora"
    _own_attributes: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector", "lora_start", "lora_base"),
        *("r", "lora_alpha", "scaling"),
    )

    lora_A: Any
    lora_B: Any
    lora_magnitude_vector: Any
    lora_start: Any
    lora_base: Any
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if "scaling" not in vars(self):
            vars(self).update({name: {} for name in LoraLayer._own_attributes if name != "lora_dropout"})

    @property
    def lora_dropout(self) -> nn.ModuleDict:
        # Made for whoever asks: of a module for each adapter and layer that does nothing, most are never looked at.
        held: Any = self._modules.get("lora_dropout")
        if held is None:
            held = self._modules["lora_dropout"] = nn.ModuleDict().train(self.training)
        for adapter in (name for name in self.scaling if name not in held):
            held[adapter] = nn.Identity().train(self.training)
        return held

    @lora_dropout.deleter
    def lora_dropout(self) -> None:
        """There is none: what was made, nn.Module deletes."""

    def _dropout(self, adapter: str) -> nn.Module | None:
        """What drops numbers of the update's input, if anything."""
        held: Any = self._modules.get("lora_dropout")
        found = held[adapter] if held is not None and adapter in held else None
        return None if isinstance(found, nn.Identity) else found

    def add_adapter(self, adapter: str, config: LoraConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        """Create the tensors of `adapter`, in `dtype`; left uninitialized when `init` is false (for loading)."""
        r, alpha, scaling = config.settings_for(path)
        if config.lora_dropout:
            self.lora_dropout[adapter] = nn.Dropout(config.lora_dropout).train(self.training)
        self.r[adapter], self.lora_alpha[adapter], self.scaling[adapter] = r, alpha, scaling
        self._create_factors(adapter, r, dtype)
        if is_pissa(config.init_lora_weights):
            kind = str(config.init_lora_weights)
            start = pissa_start(self.dense_weight(), r, scaling, kind, dtype)
            self._container("lora_start", nn.ModuleDict)[adapter] = start
        if config.init_lora_weights == "loftq":
            self._quantize_base(adapter, config, init)
        elif init:
            self._init_factors(adapter, config.init_lora_weights)
        if config.use_dora:
            # m starts as the weight's own length, so that the start is the identity (section 4.1 of the paper).
            length = self.adapted_length(adapter) if init else torch.empty(self._lora_shape()[0])
            magnitude = nn.Parameter(length.to(self._weight_device(), dtype))
            self._container("lora_magnitude_vector", nn.ParameterDict)[adapter] = magnitude
        if config.bias != "none" and self._parameters.get("bias") is not None:
            self.train_bias(adapter, dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self._base_output(x, *args, **kwargs)
        if self.merged_adapters:
            self._check_not_by_row()
            return base
        if self.switch.rows is not None:
            return add_row_updates(self, self.switch.rows, x, base)
        out = base
        for adapter in self.switch.acting:
            if adapter in self.scaling:
                out = self.add_update(adapter, x, base, out)
        return out

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.switch.acting if self.lora_base and not self.merged_adapters else ()
        own = next((adapter for adapter in acting if adapter in self.lora_base), None)
        if own is None:
            return super().forward(x, *args, **kwargs)
        out: Tensor = self.lora_base[own](x)
        return out if self.bias is None else (out + self.bias).to(out.dtype)

    def fused_adapter(self) -> str | None:
        """The adapter whose update is made in one operation with the base product: it acts alone, on the same x."""
        acting = () if self.merged_adapters else self.switch.acting
        own = [adapter for adapter in acting if adapter in self.scaling]
        if len(own) != 1:
            return None
        adapter = own[0]
        if adapter in self.lora_magnitude_vector or adapter in self.lora_start or adapter in self.lora_base:
            return None
        dropout = self._dropout(adapter)
        return None if dropout is not None and dropout.training else adapter

    def _check_not_by_row(self) -> None:
        if self.switch.rows is not None:
            raise ValueError(f"adapter_names needs unmerged weights, but {list(self.merged_adapters)} are merged")

    def add_update(self, adapter: str, x: Tensor, base: Tensor, out: Tensor) -> Tensor:
        """`out` with what `adapter` changes; `base` is the base layer's own output for `x`."""
        update = self.update(adapter, x)
        if adapter not in self.lora_magnitude_vector:
            return (out + update).to(out.dtype)
        # DoRA: W' = m (W + s B A) / |W + s B A|; the length is a constant for the gradient (section 4.3).
        ratio = self.lora_magnitude_vector[adapter] / self.adapted_length(adapter).to(update.dtype)
        unbiased = base if self.bias is None else base - self.bias
        return (out + (ratio - 1) * unbiased + ratio * update).to(out.dtype)

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """s B A dropout(x), minus s B0 A0 x for PiSSA: (..., in_features) -> (..., out_features)."""
        scaling = self.scaling[adapter]
        dropout = self._dropout(adapter)
        x_dropped = x if dropout is None else dropout(x)
        update = lora_update(x_dropped, *self.factors(adapter), scaling)
        return update - self.lora_start[adapter].update(x, scaling) if adapter in self.lora_start else update

    @torch.no_grad()
    def adapted_length(self, adapter: str) -> Tensor:
        """(out_features,) float32: |W'|, the weight with the update; one Euclidean length per output feature."""
        return (self.dense_weight() + self._product(adapter)).norm(dim=1)

    @torch.no_grad()
    def delta_weight(self, adapter: str) -> Tensor:
        """(out_features, in_features) float32: what merging `adapter` adds to the weight."""
        product = self._product(adapter)
        if adapter not in self.lora_magnitude_vector:
            return product
        weight = self.dense_weight()
        ratio = wide(self.lora_magnitude_vector[adapter]) / self.adapted_length(adapter)
        return ratio[:, None] * (weight + product) - weight

    def _product(self, adapter: str) -> Tensor:
        lora_A, lora_B = self.factors(adapter)
        product = wide(lora_B) @ wide(lora_A)
        if adapter in self.lora_start:
            product = product - self.lora_start[adapter].product()
        return product * self.scaling[adapter]

    def merged_weight(self, adapters: tuple[str, ...]) -> Tensor:
        """(out_features, in_features) float32: the base weight with the updates of `adapters` added."""
        own = next((adapter for adapter in adapters if adapter in self.lora_base), None)
        weight = self.dense_weight().clone() if own is None else self.lora_base[own].dequantize(torch.float32)
        for adapter in adapters:
            if adapter in self.scaling:
                weight += self.delta_weight(adapter)
        return weight

    def merge(self, adapters: tuple[str, ...]) -> None:
        merged = self.merged_weight(adapters)
        super().merge(adapters)
        self._install_weight(merged)

    def adapts(self, adapter: str) -> bool:
        """True if `adapter` has a low-rank update here (it may have a bias alone)."""
        return adapter in self.scaling

    def adapter_names(self) -> set[str]:
        return set(self.scaling) | super().adapter_names()

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        bias = super().adapter_state(adapter)
        if adapter not in self.scaling:
            return bias
        state = self._factor_state(adapter)
        if adapter in self.lora_magnitude_vector:
            state["lora_magnitude_vector"] = self.lora_magnitude_vector[adapter]
        # PEFT wraps the modules that it adapts, and this name is what the wrapping leaves in its files.
        return {**state, **{f"base_layer.{name}": tensor for name, tensor in bias.items()}}

    def plain_state(self, adapter: str, values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Of a PiSSA adapter LoRA of twice the rank: B A - B0 A0 = [B, -B0] [A; A0]."""
        state = super().plain_state(adapter, values)
        if adapter in self.lora_start:
            start, lora_A, lora_B = self.lora_start[adapter], state["lora_A.weight"], state["lora_B.weight"]
            state["lora_A.weight"] = torch.cat([lora_A, start.lora_A.to(lora_A)], dim=0)
            state["lora_B.weight"] = torch.cat([lora_B, -start.lora_B.to(lora_B)], dim=1)
        return state

    def stored_beside(self, adapter: str) -> bool:
        return self.adapts(adapter)

    def merged_finite(self, adapters: tuple[str, ...]) -> bool:
        return bool(torch.isfinite(self.merged_weight(adapters)).all())

    def replaced_tensors(self, adapter: str) -> list[str]:
        return [*super().replaced_tensors(adapter), *(["weight"] if adapter in self.lora_base else [])]

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        dropout: Any = self._modules.get("lora_dropout") or {}
        for holder in (self.lora_A, self.lora_B, dropout, self.lora_magnitude_vector, self.lora_start, self.lora_base):
            if adapter in holder:
                del holder[adapter]
        for numbers in (self.r, self.lora_alpha, self.scaling):
            numbers.pop(adapter, None)

    # How one kind of layer differs from another.

    def dense_weight(self) -> Tensor:
        """(out_features, in_features) float32: the base weight."""
        raise NotImplementedError

    def _install_weight(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _lora_shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        raise NotImplementedError

    def _weight_device(self) -> torch.device:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.device

    def _create_factors(self, adapter: str, r: int, dtype: torch.dtype) -> None:
        out_features, in_features = self._lora_shape()
        device = self._weight_device()
        for name, shape in (("lora_A", (r, in_features)), ("lora_B", (out_features, r))):
            factor = _empty_linear(torch.empty(shape, device=device, dtype=dtype))
            self._container(name, nn.ModuleDict)[adapter] = factor

    def _init_factors(self, adapter: str, kind: bool | str) -> None:
        lora_A, lora_B = self.factors(adapter)
        if adapter in self.lora_start:
            lora_A.data.copy_(self.lora_start[adapter].lora_A)
            lora_B.data.copy_(self.lora_start[adapter].lora_B)
        else:
            init_factors(lora_A, lora_B, kind)

    def _quantize_base(self, adapter: str, config: LoraConfig, init: bool) -> None:
        """Give `adapter` the quantized weight of LoftQ, and with `init` the factors that go with it."""
        rounds = LoftQConfig(**config.loftq_config).loftq_iter
        packed, *new = loftq(self.dense_weight().float(), self.r[adapter], self.scaling[adapter], rounds)
        self._container("lora_base", nn.ModuleDict)[adapter] = LoftqBase.of(packed, self._weight_device())
        for factor, value in zip(self.factors(adapter), new, strict=True) if init else ():
            factor.data.copy_(value)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The live A (r, in_features) and B (out_features, r) of `adapter`."""
        # Not as attributes: nn.Module looks for those in three places, at every token of every layer.
        held: Any = self._modules
        return held["lora_A"][adapter].weight, held["lora_B"][adapter].weight

    def _factor_state(self, adapter: str) -> dict[str, Tensor]:
        lora_A, lora_B = self.factors(adapter)
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def _empty_linear(weight: Tensor) -> nn.Linear:
    """A linear layer without bias that has `weight`, as it is.

    `nn.Linear(...)` would draw random numbers that are drawn again, or loaded, right after; `nn.utils.skip_init` takes
    0.1 ms to avoid it, as long as all else of loading a layer's adapter. Assigning the attributes, which nn.Module
    looks at one by one, would be half of the time spent here.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    out_features, in_features = weight.shape
    vars(linear).update(in_features=in_features, out_features=out_features)
    linear._parameters.update(weight=nn.Parameter(weight), bias=None)
    return linear


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""The tensors and numbers of a layer's LoRA adapters, made as late and as cheaply as torch allows.

Loading an adapter means making two small modules for each of hundreds of layers, and nn.Module is slow at that: the
ways around it, which are no part of LoRA, are collected here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.dispatched import device_of
from minipeft.errors import PeftWarning
from minipeft.lora.calls import LoraCalls
from minipeft.lora.variants import Plain, wide


class AdapterStore(LoraCalls):
    """A layer's holders of its LoRA adapters' tensors and numbers.

    Attributes (all keyed by adapter name, as in PEFT):
        lora_A, lora_B: `nn.Linear`, whose weights are the factors (r, in_features), (out_features, r); the latter has
            a bias with `lora_bias` alone. For convolutions these are convolutions (`conv.py`).
        lora_dropout: applied to the update's input; `nn.Identity` for adapters without dropout.
        lora_magnitude_vector: DoRA's m, as `weight` (out_features,); only for adapters that use it.
        lora_start: the factors that are subtracted; only for adapters that start as PiSSA.
        lora_base: the layer that acts in the place of the base weight; only for adapters that start as LoftQ.
        lora_embedding_A, lora_embedding_B: the factors of an embedding, in the place of lora_A and lora_B.
        r, lora_alpha, scaling, use_dora, use_rslora, lora_bias: the numbers and settings.
        variants: the adapter's `Plain`, `WithBias`, `Dora`, `Pissa` or `Loftq`.
    """

    # The name of the parameter that the adapters change.
    weight_name: ClassVar[str] = "weight"
    # True for a part of an adapted module that is no target itself.
    is_part: ClassVar[bool] = False
    _own_attributes: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector", "lora_start", "lora_base"),
        *("lora_embedding_A", "lora_embedding_B", "r", "lora_alpha", "scaling"),
        *("use_dora", "use_rslora", "lora_bias", "variants"),
    )

    lora_A: Any
    lora_B: Any
    lora_magnitude_vector: Any
    lora_start: Any
    lora_base: Any
    lora_embedding_A: Any
    lora_embedding_B: Any
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    variants: dict[str, Plain]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        # Empty dictionaries, of which `_container` makes modules when they get something to hold.
        if "scaling" not in vars(self):
            vars(self).update({name: {} for name in AdapterStore._own_attributes if name != "lora_dropout"})

    @property
    def lora_dropout(self) -> nn.ModuleDict:
        """The dropout of each adapter (PEFT's name). The modules are made when this is first read.

        Most adapters have no dropout, and an nn.Identity for each of them and each layer would never be called.
        """
        held: Any = self._modules.get("lora_dropout")
        if held is None:
            held = self._modules["lora_dropout"] = nn.ModuleDict().train(self.training)
        for adapter in (name for name in self.scaling if name not in held):
            held[adapter] = nn.Identity().train(self.training)
        return held

    @lora_dropout.deleter
    def lora_dropout(self) -> None:
        """Nothing to do: nn.Module deletes the ModuleDict."""

    def dropout_of(self, adapter: str) -> nn.Module | None:
        """The module that drops numbers of the update's input, if the adapter has one."""
        held: Any = self._modules.get("lora_dropout")
        found = held[adapter] if held is not None and adapter in held else None
        return None if isinstance(found, nn.Identity) else found

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The live A (r, in_features) and B (out_features, r) of `adapter`."""
        # Read from the dictionaries, since nn.Module searches three of them for an attribute, at every token.
        held: Any = self._modules
        return held["lora_A"]._modules[adapter].weight, held["lora_B"]._modules[adapter].weight

    def is_watched(self, adapter: str) -> bool:
        """True if A's or B's module has hooks, which run where the module is called: per-sample gradients use them.

        Not for a B with a bias, which its variant adds, nor for factors that are no linear layers (tied ones).
        """
        held: Any = self._modules
        for name in ("lora_A", "lora_B"):
            factors = held.get(name)
            factor = None if factors is None else factors._modules.get(adapter)
            if not isinstance(factor, nn.Linear) or factor._parameters.get("bias") is not None:
                return False
            if factor._forward_hooks or factor._forward_pre_hooks:
                return True
            if factor._backward_hooks or factor._backward_pre_hooks:
                return True
        return False

    def called_update(self, adapter: str, x: Tensor) -> Tensor:
        """s B A x by calls of the modules, (..., in_features) -> (..., out_features), as `lora_update` gives it."""
        lora_A, lora_B = self.lora_A[adapter], self.lora_B[adapter]
        out: Tensor = lora_B(lora_A(x.to(torch.promote_types(x.dtype, lora_A.weight.dtype)))) * self.scaling[adapter]
        return out

    def low_rank_matrix(self, adapter: str) -> Tensor:
        """s B A (out_features, in_features), in float32 at least."""
        lora_A, lora_B = self.matrices(adapter)
        return wide(lora_B) @ wide(lora_A) * self.scaling[adapter]

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The live factors as matrices, A with r rows and B with r columns."""
        return self.factors(adapter)

    def per_output(self, values: Tensor) -> Tensor:
        """(out_features,) in a shape to be multiplied with the layer's output."""
        return values

    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of DoRA's m, as files hold it."""
        return (self._lora_shape()[0],)

    def adapts(self, adapter: str) -> bool:
        """True if `adapter` has a low-rank update here (it may have a bias alone)."""
        return adapter in self.scaling

    def adapter_names(self) -> set[str]:
        return set(self.scaling) | super().adapter_names()

    def stored_state(self, adapter: str, values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        state = super().stored_state(adapter, values)
        for name, tensor in state.items():
            if name.startswith(("lora_A.w", "lora_B.w", "lora_embedding_")) and tensor.dim() < 2:
                warnings.warn(
                    f"{name} of adapter {adapter!r} has shape {tuple(tensor.shape)}, expected a matrix: it seems to be "
                    "one of DeepSpeed ZeRO-3 / FSDP shards, which no adapter can be loaded from; gather them first",
                    PeftWarning,
                    stacklevel=2,
                )
                break
        return state

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        for name in AdapterStore._own_attributes:
            holder: Any = self._modules.get(name) if name == "lora_dropout" else getattr(self, name)
            if holder is not None and adapter in holder:
                del holder[adapter]

    def _create_factors(self, adapter: str, r: int, dtype: torch.dtype) -> None:
        out_features, in_features = self._lora_shape()
        device = self._weight_device()
        for name, shape in (("lora_A", (r, in_features)), ("lora_B", (out_features, r))):
            factor = _empty_linear(torch.empty(shape, device=device, dtype=dtype))
            self._container(name, nn.ModuleDict)[adapter] = factor

    def _lora_shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        raise NotImplementedError

    def _weight_device(self) -> torch.device:
        device: torch.device = self.base_weight().device
        return device_of(self) if device.type == "meta" else device

    def base_weight(self) -> Any:
        """The base weight itself: a parameter, or what FSDP or a parametrization has put in its place."""
        held = self._parameters.get(self.weight_name)
        held = vars(self).get(self.weight_name) if held is None else held
        return getattr(self, self.weight_name) if held is None else held


def _empty_linear(weight: Tensor) -> nn.Linear:
    """A linear layer without bias that has `weight`, as it is.

    `nn.Linear(...)` would draw random numbers that are drawn again, or loaded, right after; `nn.utils.skip_init` takes
    0.1 ms to avoid it, as long as all else of loading a layer's adapter. Assigning the attributes, which nn.Module
    checks one by one, would be half of the time spent here.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    out_features, in_features = weight.shape
    vars(linear).update(in_features=in_features, out_features=out_features)
    linear._parameters.update(weight=nn.Parameter(weight), bias=None)
    return linear

"""Biases that an adapter trains by copies of its own (`bias="all"` and its like).

PEFT trains a base bias in place, so its base model is changed for good and disabling the adapter cannot bring it
back. Here an adapter owns a copy of each, which stands in for the base's while the adapter acts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from minipeft.adapter import AdapterModule
from minipeft.copies import Replaced, is_handled
from minipeft.dispatched import device_of, original_value


class TrainedBias(AdapterModule):
    """A module whose `bias` an adapter may have replaced by one of its own.

    The class attribute `bias` stands before the registered parameter whenever somebody reads `module.bias`, so the
    plain forward of any module (Linear, LayerNorm, Conv1D, ...) uses the adapter's copy without knowing. What is set or
    deleted under this name is the base's, as in a plain module; FSDP does so past nn.Module, which lists parameters.
    """

    name_prefix: ClassVar[str] = "BiasTrained"
    _own_attributes: ClassVar[tuple[str, ...]] = ("trained_bias",)

    trained_bias: Any

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "trained_bias"):
            self.trained_bias = {}

    @property
    def bias(self) -> torch.Tensor | None:
        """(out_features,), in the base bias's dtype: the bias that acts now, an adapter's or the base's."""
        held: Any = vars(self) if "bias" in vars(self) else self._parameters
        if "bias" not in held:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'bias'")
        base: torch.Tensor | None = held["bias"]
        if base is None or self.merged_adapters or is_handled(self, base):
            return base
        twin = self.acting_copy() if isinstance(self, Replaced) else None
        if twin is not None:
            return twin.get_parameter("bias").to(base.dtype)
        for adapter in self.switch.acting:
            if adapter in self.trained_bias:
                own: torch.Tensor = self.trained_bias[adapter].to(base.dtype)
                return own
        return base

    @bias.setter
    def bias(self, value: torch.Tensor | None) -> None:
        vars(self)["bias"] = value

    @bias.deleter
    def bias(self) -> None:
        if vars(self).pop("bias", self) is self:
            raise AttributeError("bias")

    def train_bias(self, adapter: str, dtype: torch.dtype | None = None) -> None:
        """Give `adapter` a trainable copy of the base bias (in `dtype` if given)."""
        base = self._parameters["bias"]
        assert base is not None
        values = original_value(self, "bias", base).detach().clone().to(device_of(self))
        own = nn.Parameter(values.to(dtype or base.dtype))
        self._container("trained_bias", nn.ParameterDict)[adapter] = own

    def adapter_names(self) -> set[str]:
        return super().adapter_names() | set(self.trained_bias)

    def adapter_state(self, adapter: str) -> dict[str, torch.Tensor]:
        own = {"bias": self.trained_bias[adapter]} if adapter in self.trained_bias else {}
        return {**super().adapter_state(adapter), **own}

    def replaced_tensors(self, adapter: str) -> list[str]:
        return [*super().replaced_tensors(adapter), *(["bias"] if adapter in self.trained_bias else [])]

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.trained_bias:
            del self.trained_bias[adapter]

    def fold(self, adapters: tuple[str, ...]) -> None:
        super().fold(adapters)
        for adapter in adapters:
            if adapter in self.trained_bias:
                base = self._parameters["bias"]
                assert base is not None
                self._install("bias", self.trained_bias[adapter].to(base.dtype).clone())

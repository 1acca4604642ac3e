"""Base tensors that an adapter trains whole: `modules_to_save` and biases.

PEFT trains a base bias in place, so its base model is changed for good and disabling the adapter cannot bring it
back. Here an adapter owns a copy of the tensors that it trains, and the copy stands in for the base tensor while the
adapter acts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from minipeft.adapter import AdapterModule, WrappedForward
from minipeft.mixins import own_attributes, plain_class


def without_mixins(module: nn.Module) -> Any:
    """`module` as it was before adapters: another object, of its plain class, over the same tensors and parts.

    It belongs to no module, and holds nothing that adapters added. While they are merged, its tensors are the merged.
    """
    plain, added = plain_class(module), own_attributes(module)
    twin = plain.__new__(plain)
    vars(twin).update({name: value for name, value in vars(module).items() if name not in added})
    vars(twin)["_modules"] = {name: part for name, part in module._modules.items() if name not in added}
    if isinstance(module, WrappedForward):
        vars(twin)["forward"] = module.wrapped_forward
    return twin


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
        if base is not None and not self.merged_adapters:
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
        own = nn.Parameter(base.detach().clone().to(dtype or base.dtype))
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


class TrainedModule(AdapterModule):
    """A module that adapters replace by a trained copy of their own (`modules_to_save`).

    In memory the copy is `modules_to_save.<adapter>`, on disk it has the module's own parameter names.
    """

    name_prefix: ClassVar[str] = "Trained"
    peft_name: ClassVar[str] = "ModulesToSaveWrapper"
    _own_attributes: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    modules_to_save: nn.ModuleDict

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "modules_to_save"):
            self.modules_to_save = nn.ModuleDict()

    def add_copy(self, adapter: str, dtype: torch.dtype | None = None) -> None:
        """Give `adapter` a trainable copy of this module (its parameters in `dtype` if given)."""
        # A copy of the module must not hold the copies that other adapters have of it.
        twin = copy.deepcopy(self, {id(self.modules_to_save): nn.ModuleDict()})
        twin.detach()
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        self.modules_to_save[adapter] = twin.to(dtype) if dtype is not None else twin

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the acting adapter's trained copy; without one, and while merged, the module's own."""
        if not self.merged_adapters:
            for adapter in self.switch.acting:
                if adapter in self.modules_to_save:
                    return self._through_copy(self.modules_to_save[adapter], *args, **kwargs)
        return super().forward(*args, **kwargs)

    @property
    def original_module(self) -> Any:
        """The module without its copies (PEFT's name): see `without_mixins`."""
        return without_mixins(self)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act and have a copy of this module."""
        return [adapter for adapter in self.switch.active if adapter in self.modules_to_save]

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """As `LayerCalls.set_adapter`.

        Raises ValueError for more than one adapter, and for one that has no copy of this module.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"Attempted to set multiple ({names}) adapters at once for modules_to_save: one can act")
        for name in names:
            if name not in self.modules_to_save:
                raise ValueError(f"Adapter {name} not found in {sorted(self.modules_to_save)}")
        super().set_adapter(names, inference_mode)

    def _through_copy(self, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A float32 copy over a 16-bit model: its inputs are cast to float32, its output back to 16 bits.
        wide = next((p.dtype for p in twin.parameters()), None)
        base = next((p.dtype for p in self._parameters.values() if p is not None), wide)
        if wide == base or wide is None or torch.is_autocast_enabled(_device_type(twin)):
            return twin(*args, **kwargs)
        args = tuple(a.to(wide) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)
        out = twin(*args, **kwargs)
        return out.to(base) if torch.is_tensor(out) else out

    def adapter_names(self) -> set[str]:
        return super().adapter_names() | set(self.modules_to_save)

    def adapter_state(self, adapter: str) -> dict[str, torch.Tensor]:
        if adapter not in self.modules_to_save:
            return super().adapter_state(adapter)
        return {**super().adapter_state(adapter), **self.modules_to_save[adapter].state_dict(keep_vars=True)}

    def replaced_tensors(self, adapter: str) -> list[str]:
        own = self.modules_to_save[adapter].state_dict() if adapter in self.modules_to_save else ()
        return [*super().replaced_tensors(adapter), *own]

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]

    def fold(self, adapters: tuple[str, ...]) -> None:
        super().fold(adapters)
        for adapter in adapters:
            if adapter not in self.modules_to_save:
                continue
            for name, parameter in self.modules_to_save[adapter].named_parameters():
                owner, leaf = self._owner_of(name)
                base = owner._parameters[leaf]
                assert base is not None
                self._install(name, parameter.to(base.dtype).clone())


def _device_type(module: nn.Module) -> str:
    return next(module.parameters()).device.type

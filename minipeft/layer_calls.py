"""The calls that PEFT has on one adapted module: which adapters act in it alone, and the module without them.

A model's verbs set the switch that all of its adapted modules share. A module that is set by itself gets a switch of
its own (`OwnSwitch`), until the model's verb is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from minipeft.dispatched import in_memory
from minipeft.errors import NotMergeableError
from minipeft.gathered import gathered
from minipeft.switch import OwnSwitch, Switch

if TYPE_CHECKING:
    # The mixins stand in front of an nn.Module class; for the type checker they are modules themselves.
    _Base = nn.Module
else:
    _Base = object


class LayerCalls(_Base):
    """PEFT's calls on one adapted module."""

    # The names of the attributes that are keyed by adapter: those that hold trained tensors, and others.
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    switch: Switch
    merged_adapters: list[str]
    adapter_names: Callable[[], set[str]]
    adapter_state: Callable[[str], dict[str, torch.Tensor]]
    fold: Callable[[tuple[str, ...]], None]
    unmerge: Callable[[], None]
    dense_form: Callable[[], nn.Module | None]
    requantize: Callable[[], None]
    unmergeable: Callable[[tuple[str, ...]], str | None]
    merged_finite: Callable[[tuple[str, ...]], bool]

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are set to act in this module, also those that have nothing here."""
        return list(self.switch.active)

    @property
    def active_adapter(self) -> list[str]:
        """As `active_adapters`."""
        return self.active_adapters

    @active_adapter.setter
    def active_adapter(self, names: str | Sequence[str]) -> None:
        names = (names,) if isinstance(names, str) else tuple(names)
        own = self._own_switch()
        own.own_active = None if names == own.shared.active else names
        self._share_again()

    _active_adapter = active_adapter

    @property
    def disable_adapters(self) -> bool:
        """True while this module acts as the base model's."""
        return not self.switch.enabled

    @property
    def merged(self) -> bool:
        """True if adapters are merged into this module."""
        return bool(self.merged_adapters)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapter_names())

    def _get_available_adapters(self) -> set[str]:
        return self.adapter_names()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these adapters act in this module, and no other; the rest of the model stays as it is.

        Their tensors here get gradients, unless `inference_mode`, and those of the others none. The model's
        `set_adapter` sets this module again.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in self.adapter_names():
            self.set_requires_grad(name, name in names and not inference_mode)
        self.active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn the gradients of these adapters' tensors in this module on or off; names that have none are left out."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            for tensor in self.adapter_state(name).values():
                if tensor.is_floating_point():
                    tensor.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Let adapters act in this module, or not; the rest of the model stays as it is.

        Turns the gradients of those that are set to act on, or of all off. Disabling unmerges this module.
        """
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self.set_requires_grad(sorted(self.adapter_names()), False)
            self.unmerge()
        own = self._own_switch()
        own.own_enabled = None if enabled == own.shared.enabled else enabled
        self._share_again()

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters (those that are set to act here by default) into this module; merged ones stay merged.

        Args:
            safe_merge: Check first that no merged weight is infinite or NaN.

        Raises ValueError for adapters that cannot be merged here and, with `safe_merge`, for non-finite weights.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        new = [name for name in dict.fromkeys(wanted) if name in self.adapter_names() - set(self.merged_adapters)]
        names = (*self.merged_adapters, *new)
        reason = self.unmergeable(names)
        if reason is not None:
            raise NotMergeableError(f"{reason} (adapters {list(names)})")
        before = tuple(self.merged_adapters)
        self.unmerge()
        finite = not safe_merge or self.finite_here(names)
        if new or before:
            self.fold_here(names if finite else before)
        if not finite:
            raise ValueError(f"NaNs detected in the merged weights. The adapter {new[0]} seems to be broken")

    def finite_here(self, adapters: tuple[str, ...]) -> bool:
        """`merged_finite`, also of weights that accelerate offloaded or FSDP2 sharded."""
        with in_memory(self), gathered(self) as true:
            true.append(self.merged_finite(adapters))
        return true[0]

    def fold_here(self, adapters: tuple[str, ...]) -> None:
        """`fold`, also into weights that accelerate offloaded or FSDP2 sharded."""
        with in_memory(self), gathered(self):
            self.fold(adapters)

    def dense_form_here(self) -> nn.Module | None:
        """`dense_form`, also of weights that accelerate offloaded."""
        with in_memory(self):
            return self.dense_form()

    def requantize_here(self) -> None:
        """`requantize`, also of weights that accelerate offloaded."""
        with in_memory(self):
            self.requantize()

    def follow(self, active: bool = False, enabled: bool = False) -> None:
        """Go back to the model's adapters (`active`), to its being enabled or not (`enabled`), or to both."""
        own = self.switch
        if isinstance(own, OwnSwitch):
            own.own_active = None if active else own.own_active
            own.own_enabled = None if enabled else own.own_enabled
            self._share_again()

    def _own_switch(self) -> OwnSwitch:
        if not isinstance(self.switch, OwnSwitch):
            self.switch = OwnSwitch(self.switch)
        return self.switch

    def _share_again(self) -> None:
        own = self.switch
        if isinstance(own, OwnSwitch) and own.own_active is None and own.own_enabled is None:
            self.switch = own.shared

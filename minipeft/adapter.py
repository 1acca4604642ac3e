"""The contract that every method's module keeps, and how a module becomes one.

A module is adapted by putting a mixin in front of its class, in place, as torch's `fully_shard` does: a
`nn.Linear` becomes a `LoraLinear(LoraLayer, nn.Linear)`. It stays the same object, so its parameters keep their
names and the model its hooks, and taking the mixin out again gives back exactly the plain module.

Every adapted module of a model looks at one shared `Switch`: disabling all adapters is one assignment, however large
the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from minipeft import dispatched
from minipeft.layer_calls import LayerCalls
from minipeft.mixins import Face, Mixin, mix_in, mix_out, own_attributes
from minipeft.switch import Switch as Switch


class AdaptedModel(Face):
    """A model that carries adapters, as the functions of the core see it; `PeftModel` is its public face.

    Attributes:
        peft_config: adapter name -> its config.
        _switch: the switch that its adapted modules share.
        _targets: adapter name -> dotted names of the modules that it adapts.
        _row_checks: adapter name -> its method's `Registration.rows`, looked up when the adapter is attached:
            torch.compile cannot follow the look-up during a call.
    """

    peft_config: dict[str, Any]
    _switch: Switch
    _targets: dict[str, list[str]]
    _row_checks: dict[str, Callable[..., Any]]


class AdapterModule(LayerCalls, Mixin):
    """A module that holds the tensors of some adapters, and can be asked about them.

    A subclass says which tensors are an adapter's (`adapter_state`), how an adapter is added and removed
    (`add_adapter`, `delete_adapter`) and, where the method can, how it is folded into the base tensors (`fold`). Two
    mixins may stand in front of one module, for adapters of two methods: so every method here passes on to `super()`.

    Merging never writes into a base tensor: it puts a new one in its place and keeps the original, so `unmerge` is
    exact in every dtype, and a tensor that another module shares (tied embeddings) is left alone.
    """

    # PEFT's word for such a module, where it does not follow from the class's name.
    peft_name: ClassVar[str] = ""
    # Attributes that this class adds to the module, removed when it becomes plain again.
    _own_attributes: ClassVar[tuple[str, ...]] = ("switch", "merged_adapters", "_originals")

    switch: Switch
    merged_adapters: list[str]
    _originals: dict[str, nn.Parameter | None]

    def attach(self, switch: Switch) -> None:
        """Set up the attributes that are not there yet, right after the module's class was changed."""
        if not hasattr(self, "switch"):
            self.switch = switch
            self.merged_adapters = []
            self._originals = {}

    def detach(self) -> None:
        """Make the module plain again: every mixin goes, and all adapters with them. Merged weights stay."""
        own = dispatched.forward_without_adapters(self)
        for name in own_attributes(self):
            delattr(self, name)
        mix_out(self, AdapterModule)
        dispatched.give_own_forward(self, own)

    def _container(self, name: str, kind: type[nn.Module]) -> Any:
        """The attribute `name`, a `kind` keyed by adapter, made with its first entry; until then it is a plain dict.

        Making a module for each of them would take most of the time in which an adapter is attached.
        """
        if not isinstance(getattr(self, name), nn.Module):
            setattr(self, name, kind())
        return getattr(self, name)

    def adapter_names(self) -> set[str]:
        """The adapters that have tensors here."""
        return set()

    def adapter_state(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors of `adapter` here (none if it has none), by PEFT's names relative to this module.

        A name that starts with "/" is the whole name on disk, for methods whose files do not name modules.
        """
        return {}

    def stored_state(self, adapter: str, values: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors in the adapter's file, with `values(tensor)` in the place of each live tensor.

        By default those of `adapter_state`; a method whose file holds other tensors than it trains overrides this.
        """
        return {name: values(tensor) for name, tensor in self.adapter_state(adapter).items()}

    def plain_state(self, adapter: str, values: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """As `stored_state`, of the plain adapter that acts alike on the base model itself (`PeftConfig.plain`)."""
        return self.stored_state(adapter, values)

    def parameter_targets(self, adapter: str) -> list[str]:
        """The module's own parameters that `adapter` updates where it was aimed at them and not at the module."""
        return []

    def stored_beside(self, adapter: str) -> bool:
        """True if the file of `adapter` holds the base weight of this module as well, should it be an embedding.

        PEFT writes it then under a name of its own, which says that the embedding is adapted.
        """
        return False

    def stored_as(self, adapter: str) -> str:
        """The name, relative to this module, of its base weight in the file of `adapter`, should it be stored."""
        return "weight"

    def replaced_tensors(self, adapter: str) -> list[str]:
        """The base parameters that `adapter` replaces by its own: two adapters that do so cannot act together."""
        return []

    def delete_adapter(self, adapter: str) -> None:
        """Forget the tensors of `adapter`; nothing happens if it has none here."""

    def fold(self, adapters: tuple[str, ...]) -> None:
        """Fold `adapters` into the base tensors, so that the plain forward gives the adapted output."""
        self.merged_adapters = list(adapters)

    def unmerge(self) -> None:
        """Put the original base tensors back, bit for bit. Nothing happens if nothing is merged."""
        for path in list(self._originals):
            owner, name = self._owner_of(path)
            dispatched.put_back(owner, name, self._originals.pop(path))
        self.merged_adapters = []

    def unmergeable(self, adapters: tuple[str, ...]) -> str | None:
        """The reason why `adapters` cannot be merged into this module, if there is one."""
        return dispatched.why_unmergeable(self)

    def merged_finite(self, adapters: tuple[str, ...]) -> bool:
        """True if merging `adapters` would leave no weight here infinite or NaN. Nothing is changed."""
        return True

    def dense_form(self) -> nn.Module | None:
        """The module to put in the place of this one when all adapters go; None if this one, made plain, will do.

        A packed layer whose merged weight is dense gives a dense layer.
        """
        return None

    def requantize(self) -> None:
        """Pack a merged weight again as the base weight was; nothing happens if it was not packed."""

    def _install(self, path: str, tensor: torch.Tensor) -> None:
        """Put `tensor` in the place of the base parameter `path`, keeping the original for `unmerge`."""
        owner, name = self._owner_of(path)
        original = dispatched.put(owner, name, nn.Parameter(tensor.detach(), requires_grad=False))
        self._originals.setdefault(path, original)

    def _owner_of(self, path: str) -> tuple[nn.Module, str]:
        prefix, _, name = path.rpartition(".")
        return self.get_submodule(prefix), name

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # The originals are not registered while merged tensors stand in their place: move them along.
        for original in self._originals.values():
            if original is not None:
                original.data = fn(original.data)
        return super()._apply(fn, recurse)


class WrappedForward(AdapterModule):
    """A module whose instance has a `forward` of its own, such as a patch of Liger's.

    Such an attribute hides the class's forward, and so every mixin's. Here it is kept aside, behind the mixins, which
    call it as the module's own.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("wrapped_forward",)

    wrapped_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the instance's own forward."""
        return self.wrapped_forward(*args, **kwargs)


def become(module: Any, mixin: type[AdapterModule], switch: Switch) -> None:
    """Make `module` an instance of `mixin`, in front of other adapters' mixins but for the `outermost` ones."""
    if isinstance(module, mixin):
        return
    added = [mixin]
    own = dispatched.take_own_forward(module)
    if own is not None and not isinstance(module, WrappedForward):
        added.insert(0, WrappedForward)
    in_front = sorted([*mix_out(module, Mixin), *((one, ()) for one in added)], key=lambda one: one[0].outermost)
    for one, offered in in_front:
        mix_in(module, one, offered)
    module.attach(switch)
    if own is not None:
        module.wrapped_forward = own


def base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The dotted names and modules of the base model: `named_modules` without the modules that adapters added.

    So it costs the same however many adapters there are.
    """
    found: dict[nn.Module, str] = {}
    _find_modules(model, "", found)
    return [(path, module) for module, path in found.items()]


def _find_modules(module: nn.Module, path: str, found: dict[nn.Module, str]) -> None:
    if module in found:
        return
    found[module] = path
    added = own_attributes(module) if isinstance(module, AdapterModule) else ()
    start = f"{path}." if path else ""
    for name, child in module._modules.items():
        if child is not None and name not in added:
            _find_modules(child, start + name, found)


@dataclasses.dataclass(frozen=True)
class Part:
    """A module that carries a part of an adapter besides those that its method adapts.

    Attributes:
        path: The module's dotted name.
        mixin: Goes in front of the module's class.
        add: (module, adapter, dtype, init) -> None: creates the tensors.
    """

    path: str
    mixin: type[AdapterModule]
    add: Callable[[Any, str, torch.dtype, bool], None]


@dataclasses.dataclass(frozen=True)
class Method:
    """The way in which adapters of one method find their modules.

    Attributes:
        find: (model, config, paths to leave alone) -> dotted names of the modules to adapt. Fills in what the config
            left open, and raises ValueError when something in it matches nothing.
        mixin_for: the mixin that adapts a module, or None if the method cannot. The mixin has a method
            `add_adapter(adapter, config, path, dtype, init)`.
        connect: (model, adapter, the names that `find` gave), called when all of them have the adapter, for modules
            that share its tensors.
        parts: (model, config, paths to leave alone, the names that `find` gave) -> what the adapter has beside those.
    """

    find: Callable[[Any, Any, list[str]], list[str]]
    mixin_for: Callable[[nn.Module], Any]
    connect: Callable[[Any, str, list[str]], None] | None = None
    parts: Callable[[Any, Any, list[str], list[str]], list[Part]] | None = None

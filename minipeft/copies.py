"""Modules that an adapter trains whole (`modules_to_save`), by copies of its own.

A copy stands in for the base's module while its adapter acts: whoever calls the module, or reads a weight of it without
calling (a fused loss that multiplies by `lm_head.weight`), meets the copy's. `named_parameters`, `state_dict` and
`get_parameter` go by names, under which the base's tensors and the copies' lie side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minipeft.adapter import AdapterModule, WrappedForward, base_modules, become
from minipeft.dispatched import give_own_forward, hooks_of, in_memory, is_moving, without_hooks
from minipeft.mixins import own_attributes, plain_class
from minipeft.shards import is_sharded
from minipeft.switch import OwnSwitch

# The modules that take each row of a batch through an adapter of its own, as in PEFT.
_BY_ROW = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def without_mixins(module: nn.Module) -> Any:
    """`module` as it was before adapters: another object, of its plain class, over the same tensors and parts.

    It belongs to no module, and holds nothing that adapters added. While they are merged, its tensors are the merged.
    """
    plain, added = plain_class(module), own_attributes(module)
    twin = plain.__new__(plain)
    vars(twin).update({name: value for name, value in vars(module).items() if name not in added})
    vars(twin)["_modules"] = {name: part for name, part in module._modules.items() if name not in added}
    if isinstance(module, WrappedForward):
        give_own_forward(twin, module.wrapped_forward)
    return twin


def parameter_called(model: nn.Module, target: str) -> nn.Parameter:
    """`model.get_parameter(target)`: as in `named_parameters`, the base's where an adapter trains its module whole.

    transformers ties weights by it. Raises AttributeError for a name that there is not.
    """
    path, _, leaf = target.rpartition(".")
    held = model.get_submodule(path)._parameters.get(leaf)
    return held if held is not None else nn.Module.get_parameter(model, target)


def is_handled(module: nn.Module, tensor: Any) -> bool:
    """True for a base tensor of `module` that others move about by its name, and must find under it.

    FSDP's first version writes what it finds into the parameter that it holds flat; its second one takes what it finds
    for its shard; an accelerate hook makes a parameter like it, one that gets gradients if it does.
    """
    return getattr(tensor, "_fsdp_flattened", False) or is_sharded(tensor) or is_moving(module)


class Replaced(AdapterModule):
    """A module that a trained copy stands in for: called, and where a tensor of it is read as an attribute.

    Attributes:
        casts: False where whoever calls sees to the copy's dtype (`lora/contexts.py`).
    """

    casts: ClassVar[bool] = True

    def acting_copy(self) -> nn.Module | None:
        """The copy that stands in for this module now; None if the module acts itself."""
        return None

    def __getattr__(self, name: str) -> Any:
        held = vars(self)
        if name not in held.get("_parameters", ()) and name not in held.get("_buffers", ()):
            return super().__getattr__(name)
        twin, base = self.acting_copy(), super().__getattr__(name)
        if twin is None or is_handled(self, base):
            return base
        own = getattr(twin, name)
        # A float32 copy over a 16-bit model: who reads its weight multiplies by 16-bit activations.
        return own.to(base.dtype) if torch.is_tensor(base) and base.is_floating_point() else own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the copy that stands in for this module, if there is one; the module's own otherwise."""
        twin = self.acting_copy()
        return super().forward(*args, **kwargs) if twin is None else self._through(twin, *args, **kwargs)

    def _through(self, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of `twin`: one in float32 over a 16-bit model gets float32, and 16 bits come out again."""
        wide = next(twin.parameters(), None) if self.casts else None
        base = next(self.parameters(), None)
        if wide is None or base is None or wide.dtype == base.dtype or torch.is_autocast_enabled(wide.device.type):
            return twin(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), base.dtype, wide.dtype)
        return _cast(twin(*args, **kwargs), wide.dtype, base.dtype)


def _cast(values: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return pytree.tree_map(lambda one: one.to(new) if torch.is_tensor(one) and one.dtype == old else one, values)


class TrainedModule(Replaced):
    """A module that adapters replace by a trained copy of their own (`modules_to_save`).

    In memory the copy is `modules_to_save.<adapter>`, on disk it has the module's own parameter names.
    """

    name_prefix: ClassVar[str] = "Trained"
    peft_name: ClassVar[str] = "ModulesToSaveWrapper"
    _own_attributes: ClassVar[tuple[str, ...]] = ("modules_to_save", "_original_buffers")
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("modules_to_save",)

    modules_to_save: nn.ModuleDict
    # The base's buffers by name, while merged ones stand in their places.
    _original_buffers: dict[str, Tensor | None]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if "modules_to_save" not in self._modules:
            self.modules_to_save = nn.ModuleDict()
            self._original_buffers = {}

    def add_copy(self, adapter: str, dtype: torch.dtype | None = None) -> None:
        """Give `adapter` a trainable copy of this module (its parameters in `dtype` if given)."""
        inside = [(path, part) for path, part in base_modules(self) if path]
        for path, part in inside:
            if _has_tensors(part):
                become(part, TrainedPart, self.switch.shared)
                TrainedPart.follow_whole(part, self, path)  # type: ignore[arg-type]
        if isinstance(self, nn.Sequential):
            become(self, TrainedSequence, self.switch)
        twin = self._plain_copy()
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        self.modules_to_save[adapter] = twin.to(dtype) if dtype is not None else twin

    def _plain_copy(self) -> Any:
        """A copy of this module as it was before adapters, without the hooks that are called with this module."""
        memo: dict[int, Any] = {}
        for _, part in base_modules(self):
            if isinstance(part, AdapterModule):
                memo[id(part.switch)] = part.switch
                memo |= {id(part.modules_to_save): nn.ModuleDict()} if isinstance(part, TrainedModule) else {}
                memo |= {id(part.wholes): []} if isinstance(part, TrainedPart) else {}
        for _, part in base_modules(self):
            # What torch.nn.utils.weight_norm computed in the last call, which a copy computes anew.
            computed = [value for value in vars(part).values() if isinstance(value, Tensor) and value.requires_grad]
            memo |= {id(value): value.detach().clone() for value in computed}
        # Among what a hook holds are all weights of the model.
        memo |= {id(hook): hook for hook in hooks_of(self)}
        with in_memory(self):
            twin = copy.deepcopy(self, memo)
        without_hooks(twin)
        for part in list(twin.modules()):
            if isinstance(part, AdapterModule):
                part.detach()
        for name in _HOOKS:
            hooks = vars(twin)[name]
            for key in [key for key, hook in hooks.items() if not _computes_weight(hook)]:
                del hooks[key]
        return twin

    def acting_copy(self) -> nn.Module | None:
        """The copy of the adapter that acts; None without one, and while merged."""
        if self.merged_adapters:
            return None
        for adapter in self.switch.acting:
            if adapter in self.modules_to_save:
                return self.modules_to_save[adapter]
        return super().acting_copy()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the acting adapter's trained copy; without one, and while merged, the module's own.

        Raises TypeError where rows go through adapters of their own and the class of the module keeps no rows apart.
        """
        rows = self.switch.rows
        if rows is None or self.merged_adapters or self.modules_to_save.keys().isdisjoint(rows.names):
            return super().forward(*args, **kwargs)
        self.check_by_row()
        base = super().forward(*args, **kwargs)
        out = base.clone()
        for adapter, index in rows.groups(len(args[0]), args[0].device):
            if adapter in self.modules_to_save:
                own = self._through(self.modules_to_save[adapter], args[0][index], *args[1:], **kwargs)
                out.index_copy_(0, index, own.to(out.dtype))
        return out

    def check_by_row(self) -> None:
        """Raise TypeError if rows of a batch cannot go through copies of this module apart."""
        if not isinstance(self, _BY_ROW):
            names = ", ".join(kind.__name__ for kind in _BY_ROW)
            raise TypeError(
                f"Mixed batching is only supported for the following modules: {names}. An adapter of a row trains a "
                f"{plain_class(self).__name__} whole"
            )

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
            if adapter in self.modules_to_save:
                self._fold_copy(self.modules_to_save[adapter])

    def _fold_copy(self, twin: nn.Module) -> None:
        made: dict[nn.Parameter, nn.Parameter | None] = {}
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            owner, leaf = self._owner_of(name)
            base = owner._parameters[leaf]
            assert base is not None
            self._install(name, parameter.to(base.dtype).clone())
            # Parameters that are one in the copy are one in the base.
            owner._parameters[leaf] = made.setdefault(parameter, owner._parameters[leaf])
        for name, buffer in twin.named_buffers():
            owner, leaf = self._owner_of(name)
            original = owner._buffers[leaf]
            self._original_buffers.setdefault(name, original)
            owner._buffers[leaf] = buffer.to(buffer.dtype if original is None else original.dtype).clone()

    def merged_finite(self, adapters: tuple[str, ...]) -> bool:
        twins = [self.modules_to_save[adapter] for adapter in adapters if adapter in self.modules_to_save]
        finite = all(bool(parameter.isfinite().all()) for twin in twins for parameter in twin.parameters())
        return finite and super().merged_finite(adapters)

    def unmerge(self) -> None:
        super().unmerge()
        for name in list(self._original_buffers):
            owner, leaf = self._owner_of(name)
            owner._buffers[leaf] = self._original_buffers.pop(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = self._original_buffers
        held.update({name: fn(buffer) for name, buffer in held.items() if buffer is not None})
        return super()._apply(fn, recurse)

    def __getattr__(self, name: str) -> Any:
        if name == "original_module":  # PEFT's name of the module without its copies
            return without_mixins(self)
        own = vars(self).get("switch")
        alone = isinstance(own, OwnSwitch) and own.own_active and name in vars(self)["_parameters"]
        if alone and not self.active_adapters:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r} of {[*self.switch.active]}: the adapters "
                f"that train this module whole are {sorted(self.modules_to_save)}"
            )
        return super().__getattr__(name)


def _has_tensors(module: nn.Module) -> bool:
    return any(t is not None for held in (module._parameters, module._buffers) for t in held.values())


def _computes_weight(hook: Any) -> bool:
    """True for a hook of torch's (weight_norm, pruning), which computes the weight of the module it is called with."""
    return type(hook).__module__.startswith("torch.nn.utils.")


class TrainedPart(Replaced):
    """A module with tensors inside of modules that adapters train whole.

    Somebody may read or call it without calling the whole (`classifier.dense.weight`): then the same part of the acting
    copy stands in for it.

    Attributes:
        wholes: The modules that are trained whole, each with the name of this one in it.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("wholes",)

    wholes: list[tuple[Any, str]]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if "wholes" not in vars(self):
            self.wholes = []

    def follow_whole(self, whole: TrainedModule, path: str) -> None:
        """Be the part `path` of `whole`."""
        if all(one is not whole for one, _ in self.wholes):
            self.wholes.append((whole, path))

    def acting_copy(self) -> nn.Module | None:
        """The same part of the copy that stands in for a whole now; None without one."""
        for whole, path in vars(self).get("wholes", ()):
            twin = whole.acting_copy()
            if twin is not None:
                return twin.get_submodule(path)
        return super().acting_copy()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `Replaced.forward`. Raises TypeError where rows go through adapters that train the whole."""
        rows = self.switch.rows
        for whole, _ in self.wholes if rows is not None else ():
            if not whole.modules_to_save.keys().isdisjoint(rows.names):
                whole.check_by_row()
        return super().forward(*args, **kwargs)


class TrainedSequence(AdapterModule):
    """An `nn.Sequential` that is trained whole: its own parts are counted and run, the copies of it are none."""

    def __len__(self) -> int:
        return len(without_mixins(self))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(without_mixins(self))

    def __getitem__(self, index: Any) -> Any:
        return without_mixins(self)[index]

"""Modules that accelerate dispatched (`device_map`, CPU and disk offload): its hooks, and the weights that they bring.

A hook is put around a module's forward by an attribute of the instance, `forward`, which calls `_old_forward`. Adapters
act inside of it, where the input and the weight are on one device, whichever of the two came first.

An offloaded weight is on the device meta but for the time of a call; its values lie in the hook's `weights_map`.
Nothing here imports accelerate: hooks are known by their attributes.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.gathered import put_back_shard
from minipeft.mixins import own_attributes
from minipeft.packed import Packed
from minipeft.shards import is_sharded

logger = logging.getLogger("minipeft")

# What accelerate adds to a module's instance.
_HOOK, _BEHIND = "_hf_hook", "_old_forward"
# In a module's __dict__ while its forward runs, inside of the hook.
_RUNS = "_forward_runs"


class ChangedWeights(Mapping[str, Tensor]):
    """The weights of a hook, some of them replaced.

    Attributes:
        under: The hook's own mapping.
        changed: The tensors that stand in the places of its own, on the CPU.
    """

    def __init__(self, under: Mapping[str, Tensor]) -> None:
        self.under = under
        self.changed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.under[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.under)

    def __len__(self) -> int:
        return len(self.under)


def offload_hook(module: nn.Module) -> Any:
    """The hook that brings the weights of `module` for each call; None if they are where they are used."""
    hook: Any = vars(module).get(_HOOK)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and one.weights_map is not None:
            return one
    return None


def has_lost_values(module: nn.Module) -> bool:
    """True if a parameter of `module` itself is on the device meta, and no hook brings its values."""
    on_meta = any(parameter is not None and parameter.is_meta for parameter in module._parameters.values())
    return on_meta and offload_hook(module) is None


def why_unmergeable(module: nn.Module) -> str | None:
    """The reason why nothing can be added to the parameters of `module` itself, where they are, if there is one."""
    if has_lost_values(module):
        return "its weight has no values (device meta), and nothing can be added to it"
    shards: list[Any] = [parameter for parameter in module._parameters.values() if is_sharded(parameter)]
    packed = bool(shards) and isinstance(module, Packed)
    if packed or any(type(p).__name__ not in ("Shard", "Replicate") for shard in shards for p in shard.placements):
        # Merged it would be dense, and whole in every process.
        how = "in 4 bits and" if packed else "in another way than FSDP2's by rows"
        return (
            f"its weight is {how} sharded over processes: save the adapter, and merge it into the model in one process"
        )
    return None


def is_moving(module: nn.Module) -> bool:
    """True while a hook may be bringing weights to `module` or taking them away: then it must meet the base's own."""
    return _HOOK in vars(module) and not vars(module).get(_RUNS) and offload_hook(module) is not None


def _base_parts(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and its parts, without those that adapters added: as many however many adapters there are."""
    yield module
    added = own_attributes(module)
    for name, part in module._modules.items():
        if part is not None and name not in added:
            yield from _base_parts(part)


def device_of(module: nn.Module) -> torch.device:
    """The device on which the first parameter in `module` is used: where its hook brings it, if it is offloaded."""
    for part in _base_parts(module):
        for parameter in part._parameters.values():
            if parameter is not None:
                hook = offload_hook(part) if parameter.is_meta else None
                return parameter.device if hook is None else _execution_device(hook)
    return torch.device("cpu")


def _execution_device(hook: Any) -> torch.device:
    return torch.device(hook.execution_device)


@contextlib.contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Inside the block, the offloaded weights of `module` and of its parts are where they are used."""
    brought = []
    for part in _base_parts(module):
        hook = offload_hook(part)
        if hook is not None and any(p is not None and p.is_meta for p in part._parameters.values()):
            hook.pre_forward(part)
            brought.append((part, hook))
    try:
        yield
    finally:
        for part, hook in brought:
            hook.post_forward(part, None)


def original_value(module: nn.Module, name: str, held: Tensor) -> Tensor:
    """The values of the base parameter `held`, which `module` has as `name`, from its hook if they are offloaded."""
    hook = offload_hook(module) if held.is_meta else None
    if hook is None:
        return held
    weights = hook.weights_map
    value: Tensor = (weights.under if isinstance(weights, ChangedWeights) else weights)[name]
    return value


def put(owner: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Let `parameter` be the one that `owner` has as `name`, in its hook's weights, too.

    Returns: what `put_back` takes.
    """
    original = owner._parameters[name]
    owner._parameters[name] = parameter
    hook = offload_hook(owner)
    if hook is None or original is None:
        return original
    if not isinstance(hook.weights_map, ChangedWeights):
        hook.weights_map = ChangedWeights(hook.weights_map)
    hook.weights_map.changed[name] = parameter.detach().to("cpu")
    return nn.Parameter(torch.empty_like(original, device="meta"), requires_grad=False)


def put_back(owner: nn.Module, name: str, original: nn.Parameter | None) -> None:
    """Undo `put`, which gave `original`."""
    held = owner._parameters[name]
    if is_sharded(held) and original is not None:
        put_back_shard(held, original)
        return
    owner._parameters[name] = original
    hook = offload_hook(owner)
    weights = None if hook is None else hook.weights_map
    if isinstance(weights, ChangedWeights):
        weights.changed.pop(name, None)
        hook.weights_map = weights if weights.changed else weights.under


def _forward_of_class(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class that `module` has at the time of the call."""
    before = vars(module).get(_RUNS, False)
    vars(module)[_RUNS] = True
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        vars(module)[_RUNS] = before


def take_own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that the instance `module` has of its own, such as a patch of Liger's, taken out; None without one.

    A hook stays around, and calls the forward of the module's class from now on, whatever class that is by then.
    """
    slot = _BEHIND if _BEHIND in vars(module) else "forward"
    held = vars(module).get(slot)
    if held is None:
        return None
    if slot == _BEHIND:
        vars(module)[slot] = types.MethodType(_forward_of_class, module)
    else:
        del vars(module)[slot]
    return None if _is_of_class(module, held) else held


def give_own_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Undo `take_own_forward`, which gave `own`."""
    if own is not None:
        vars(module)[_BEHIND if _BEHIND in vars(module) else "forward"] = own


def forward_without_adapters(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of its own that `module` is to have when its adapters go, taken out; None without one.

    That is the one which it had before them (`WrappedForward`), or a method that it got since. Another function that it
    got since may call what it was put around, which is no more then: a warning says that it goes.
    """
    own, before = take_own_forward(module), vars(module).get("wrapped_forward")
    if own is None or isinstance(own, types.MethodType):
        return before if own is None else own
    logger.warning("a forward that was put around %s with its adapters went with them", type(module).__name__)
    return before


def follow_class(module: nn.Module) -> None:
    """Let a hook around `module` call the forward of whatever class it has; called before that changes."""
    give_own_forward(module, take_own_forward(module))


def has_own_forward(module: nn.Module) -> bool:
    """True if the instance `module` has a forward of its own besides a hook."""
    held = vars(module).get(_BEHIND, vars(module).get("forward"))
    return held is not None and not _is_of_class(module, held)


def _is_of_class(module: nn.Module, held: Any) -> bool:
    if not isinstance(held, types.MethodType) or held.__self__ is not module:
        return False
    classes = type(module).__mro__
    return held.__func__ is _forward_of_class or any(vars(cls).get("forward") is held.__func__ for cls in classes)


def without_hooks(module: nn.Module) -> None:
    """Take the hooks off `module` and its parts, as they are: no weight moves."""
    for part in module.modules():
        own = take_own_forward(part)
        for name in (_HOOK, _BEHIND, "forward", _RUNS):
            vars(part).pop(name, None)
        give_own_forward(part, own)


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of `module` and its parts."""
    return [vars(part)[_HOOK] for part in _base_parts(module) if _HOOK in vars(part)]


def keep_in_memory(module: nn.Module) -> None:
    """Bring the offloaded tensors in `module` to where they are used, and let them stay there."""
    for part in module.modules():
        hook = offload_hook(part)
        if hook is not None:
            hook.pre_forward(part)
            hook.offload = False

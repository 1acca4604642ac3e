"""Adapting a model in place: put a method's mixins in front of its modules, create an adapter's tensors.

A method says which modules it adapts and how (`adapter.Method`, found in the table of methods); the steps that are the
same for all methods are here.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from minipeft.adapter import (
    AdaptedModel,
    AdapterModule,
    Method,
    Part,
    Switch,
    base_modules,
    become,
)
from minipeft.biases import TrainedBias
from minipeft.config import PeftConfig
from minipeft.copies import Replaced, TrainedModule
from minipeft.fused import CallsItsParts, may_pass_by
from minipeft.gathered import beside_shards, check_comes_first, share_out
from minipeft.methods import method_of
from minipeft.mixins import behind_face
from minipeft.packed import Packed
from minipeft.targets import modules_to_save, plain_module_names
from minipeft.unused_names import check_names, check_unused_names


def adapter_modules(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    """The adapted modules of `model` with their dotted names."""
    return [(path, module) for path, module in base_modules(model) if isinstance(module, AdapterModule)]


def switch_of(model: nn.Module) -> Switch:
    """The switch that the adapted modules of `model` share, or a new one if there are none."""
    return next((module.switch.shared for _, module in adapter_modules(model)), Switch())


def attach_adapter(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    switch: Switch,
    autocast_adapter_dtype: bool = True,
    init: bool = True,
) -> list[str]:
    """Add `adapter` to `model`: put the method's mixins in front of its modules and create the tensors, trainable.

    Targets and modules to save that `config` left open are filled in. The model is not changed when a name does not
    match: all checks come first. Merged weights are unmerged then.

    Args:
        autocast_adapter_dtype: Hold the tensors in float32 over 16-bit and 4-bit modules.
        init: Give the tensors their start values; without, they are for loading.

    Returns: the dotted names of the modules that it adapts.

    Raises ValueError for an invalid adapter name, names that match nothing, modules that cannot be adapted, and a
        model that is sharded already.
    """
    method: Method = method_of(str(config.type_name)).load("attach")
    saved, targets, parts = check_adapter(model, config, adapter, init)
    modules: dict[str, Any] = dict(base_modules(model))
    # A start may be computed from the base weights, which must be the originals then.
    unmerge(model)
    with _undone_on_error(model, adapter), beside_shards(model, adapter):
        for path in saved:
            module = modules[path]
            become(module, TrainedModule, switch)
            module.add_copy(adapter, _adapter_dtype(module, autocast_adapter_dtype))
        for path in targets:
            module = modules[path]
            mixin = config.own_mixin(module) or method.mixin_for(module)
            become(module, mixin, switch)
            # Called on the mixin, because another mixin with an `add_adapter` of its own may stand in front.
            mixin.add_adapter(module, adapter, config, path, _adapter_dtype(module, autocast_adapter_dtype), init)
        for part in parts:
            become(modules[part.path], part.mixin, switch)
            part.add(modules[part.path], adapter, _adapter_dtype(modules[part.path], autocast_adapter_dtype), init)
        if method.connect is not None:
            method.connect(model, adapter, targets)
        if getattr(config, "bias", "none") == "all":
            train_biases(model, adapter, switch, autocast_adapter_dtype)
        for module in filter(may_pass_by, modules.values()):
            become(module, CallsItsParts, switch)
    return targets


def check_adapter(
    model: nn.Module, config: PeftConfig, adapter: str, init: bool = True
) -> tuple[list[str], list[str], list[Part]]:
    """Make the checks of `attach_adapter`, which fill in what `config` left open; `model` is not changed.

    Returns: the dotted names of the modules that are trained whole, and of those that are adapted; and further parts.

    Raises as `attach_adapter`.
    """
    check_adapter_name(adapter)
    registration = method_of(str(config.type_name))
    if init:
        check_comes_first(model)
        config.check_start()
        if registration.names is not None:
            registration.load("names")(model, config)
        check_names(model, config)
    saved = modules_to_save(model, config)
    _check_saved(model, saved)
    method: Method = registration.load("attach")
    targets = method.find(model, config, saved)
    parts = method.parts(model, config, saved, targets) if method.parts is not None else []
    if init:
        check_unused_names(model, config, targets)
    return saved, targets, parts


def add_adapter(
    model: AdaptedModel, adapter: str, config: PeftConfig, autocast_adapter_dtype: bool = True, init: bool = True
) -> None:
    """`attach_adapter`, and enter it in the model's list; it acts if there was no other. Merged weights are unmerged.

    Raises as `attach_adapter`; `config` is then as before, too.
    """
    fields = dict(vars(config))
    try:
        model._targets[adapter] = attach_adapter(model, config, adapter, model._switch, autocast_adapter_dtype, init)
    except BaseException:
        vars(config).update(fields)
        raise
    model.peft_config[adapter] = config
    check = method_of(str(config.type_name)).load("rows")
    if check is not None:
        model._row_checks[adapter] = check
    if not model._switch.active:
        model._switch.active = (adapter,)


def delete_adapter(model: AdaptedModel, adapter_name: str | Sequence[str]) -> None:
    """Remove an adapter, or several, and its tensors; if none is left to act, the first of the others acts, and warns.

    Raises ValueError for an unknown adapter, and for one that is merged; nothing is removed then.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
    modules = adapter_modules(model)
    for name in names:
        config_of(model, name)
        if any(name in module.merged_adapters for _, module in modules):
            raise ValueError(f"Cannot delete adapter(s) [{name!r}] while they are merged. Please unmerge them first.")
    for name in names:
        for _, module in modules:
            behind_face(module).delete_adapter(name)
            module.follow(active=name in module.switch.active)
        del model.peft_config[name], model._targets[name]
        model._row_checks.pop(name, None)
    left = tuple(name for name in model._switch.active if name not in names)
    model._switch.active = left or tuple(model.peft_config)[:1]
    for name in model._switch.active if not left else ():
        warnings.warn(
            f"Adapter {', '.join(names)} was active which is now deleted. Setting active adapter to {name}.",
            stacklevel=2,
        )
        set_trainable(model, name, not model.peft_config[name].inference_mode)


def config_of(model: AdaptedModel, adapter: str) -> PeftConfig:
    """The config of `adapter`.

    Raises ValueError for an unknown adapter.
    """
    if adapter not in model.peft_config:
        raise ValueError(f"Adapter {adapter} does not exist; there are {sorted(model.peft_config)}")
    config: PeftConfig = model.peft_config[adapter]
    return config


def set_trainable(model: nn.Module, adapters: str | Sequence[str], trainable: bool, others: bool | None = None) -> None:
    """Turn the gradients of the parameters of one or several adapters on or off.

    Args:
        others: The same for all other adapters; None leaves those as they are.
    """
    names = {adapters} if isinstance(adapters, str) else set(adapters)
    for adapter, parameter in adapter_parameters(model, names if others is None else None):
        parameter.requires_grad_(trainable if adapter in names else bool(others))


def adapter_parameters(model: nn.Module, adapters: set[str] | None = None) -> list[tuple[str, nn.Parameter]]:
    """All floating-point parameters of `adapters`, by default of all, each with its adapter's name."""
    return [
        (adapter, tensor)
        for _, module in adapter_modules(model)
        for adapter in (module.adapter_names() if adapters is None else adapters)
        for tensor in module.adapter_state(adapter).values()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    ]


def set_active(model: AdaptedModel, names: tuple[str, ...]) -> None:
    """Let these adapters act, and no other, also in modules that were set by themselves."""
    model._switch.active = names
    for _, module in adapter_modules(model):
        module.follow(active=True)


def set_enabled(model: AdaptedModel, enabled: bool) -> None:
    """Let adapters act, or not, also in modules that were set by themselves."""
    model._switch.enabled = enabled
    for _, module in adapter_modules(model):
        module.follow(enabled=True)


def unmerge(model: nn.Module) -> None:
    """Put the original base weights back. Nothing happens if nothing is merged."""
    merged = [module for _, module in adapter_modules(model) if module.merged_adapters]
    if merged:
        share_out(model)
    for module in merged:
        module.unmerge()


@contextlib.contextmanager
def _undone_on_error(model: nn.Module, adapter: str) -> Iterator[None]:
    """If the block fails (out of memory, most likely), remove the tensors of `adapter` that it made."""
    try:
        yield
    except BaseException:
        for _, module in adapter_modules(model):
            behind_face(module).delete_adapter(adapter)
        raise


def base_name(model: nn.Module) -> str | None:
    """The folder or hub name that the base model was loaded from, if any."""
    return getattr(model, "name_or_path", None) or None


def check_adapter_name(adapter: str) -> None:
    """Raise ValueError unless `adapter` can be part of parameter names and be a folder's name."""
    if not isinstance(adapter, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", adapter):
        raise ValueError(f"adapter name {adapter!r} must be made of letters, digits, '_' and '-'")
    if hasattr(nn.ModuleDict(), adapter) or hasattr(nn.ParameterDict(), adapter):
        raise ValueError(f"adapter name {adapter!r} is the name of something in torch's modules; take another")


def _check_saved(model: nn.Module, saved: list[str]) -> None:
    for path in saved:
        module = model.get_submodule(path)
        if isinstance(module, AdapterModule) and not isinstance(module, Replaced | CallsItsParts):
            raise ValueError(f"modules_to_save: {path!r} already carries another adapter's {type(module).__name__}")
        if isinstance(module, nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.ParameterList):
            raise TypeError(
                f"modules_to_save cannot be applied to modules of type {type(module).__name__}, which are never "
                f"called: {path!r}; name what is in it"
            )
        inside = [
            (f"{path}.{name}".strip("."), p) for path, m in base_modules(module) for name, p in m._parameters.items()
        ]
        packed = [name for name, p in inside if p is not None and not p.is_floating_point()]
        if packed:
            raise ValueError(f"modules_to_save: {path!r} is quantized ({packed[0]}), so it cannot be trained whole")


def _copies(module: AdapterModule) -> Any:
    return module.modules_to_save if isinstance(module, TrainedModule) else ()


def train_biases(model: nn.Module, adapter: str, switch: Switch, autocast: bool = True) -> None:
    """Let `adapter` train the biases of all modules, by copies of its own, but of those that are trained whole."""
    whole = tuple(f"{path}." for path, module in adapter_modules(model) if adapter in _copies(module))
    for name in plain_module_names(model):
        module = model.get_submodule(name)
        if module._parameters.get("bias") is None or isinstance(module, TrainedModule) or name.startswith(whole):
            continue
        become(module, TrainedBias, switch)
        assert isinstance(module, TrainedBias)
        if adapter not in module.trained_bias:
            module.train_bias(adapter, _adapter_dtype(module, autocast))


def _adapter_dtype(module: nn.Module, autocast: bool) -> torch.dtype:
    """float32 over a 16-bit or 4-bit module, unless `autocast` is off: then the module's own."""
    packed = next((m for _, m in base_modules(module) if isinstance(m, Packed)), None)
    first = next((p.dtype for p in module.parameters()), torch.float32)
    own = packed.weight_dtype if packed is not None else first
    return torch.float32 if autocast and own in (torch.float16, torch.bfloat16) else own

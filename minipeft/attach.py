"""Adapting a model in place: freeze it, put a method's mixins in front of its modules, create an adapter's tensors.

`methods/` says how a method finds its modules and what it does there; here is what all of them share.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from minipeft.adapter import AdapterModule, Method, Switch, base_modules, mix_in, mix_out
from minipeft.bottleneck.layer import BOTTLENECK
from minipeft.config import PeftConfig, PeftType
from minipeft.copies import TrainedBias, TrainedModule
from minipeft.lora.layers import LORA
from minipeft.nf4 import NF4Linear
from minipeft.targets import check_unused_names, modules_to_save, plain_module_names
from minipeft.virtual.prefix import PREFIXES
from minipeft.virtual.prompt import PROMPTS

METHODS: dict[Any, Method] = {
    PeftType.LORA: LORA,
    PeftType.BOTTLENECK: BOTTLENECK,
    PeftType.PREFIX_TUNING: PREFIXES,
    PeftType.PROMPT_TUNING: PROMPTS,
}


def adapter_modules(model: nn.Module) -> list[tuple[str, AdapterModule]]:
    """The adapted modules of `model` with their dotted names."""
    return [(path, module) for path, module in base_modules(model) if isinstance(module, AdapterModule)]


def switch_of(model: nn.Module) -> Switch:
    """The switch that the adapted modules of `model` share, or a new one if there are none."""
    return next((module.switch for _, module in adapter_modules(model)), Switch())


def attach_adapter(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    switch: Switch,
    autocast_adapter_dtype: bool = True,
    init: bool = True,
) -> None:
    """Add `adapter` to `model`: mix what is missing into its modules and create the tensors, trainable.

    What `config` left open (targets, modules to save) is filled in. Nothing is changed when a name does not match: all
    checks come first.

    Args:
        autocast_adapter_dtype: Hold the tensors in float32 over 16-bit and 4-bit modules.
        init: Give the tensors their start values; without, they are for loading.

    Raises ValueError for an invalid adapter name, names that match nothing, and modules that cannot be adapted.
    """
    check_adapter_name(adapter)
    if init:
        config.check_start()
    method = METHODS[config.peft_type]
    saved = modules_to_save(model, config)
    _check_saved(model, saved)
    targets = method.find(model, config, saved)
    if init:
        check_unused_names(model, config, targets)
    modules: dict[str, Any] = dict(base_modules(model))
    with _undone_on_error(model, adapter):
        for path in saved:
            module = modules[path]
            become(module, TrainedModule, switch)
            module.add_copy(adapter, _adapter_dtype(module, autocast_adapter_dtype))
        for path in targets:
            module = modules[path]
            mixin = method.mixin_for(module)
            become(module, mixin, switch)
            # The mixin's own, which need not be the one in front.
            mixin.add_adapter(module, adapter, config, path, _adapter_dtype(module, autocast_adapter_dtype), init)
        if method.connect is not None:
            method.connect(model, adapter, targets)
        if getattr(config, "bias", "none") == "all":
            _train_all_biases(model, adapter, switch, autocast_adapter_dtype)


@contextlib.contextmanager
def _undone_on_error(model: nn.Module, adapter: str) -> Iterator[None]:
    """If the block fails (out of memory, most likely), what it made of `adapter` goes."""
    try:
        yield
    except BaseException:
        for _, module in adapter_modules(model):
            module.delete_adapter(adapter)
        raise


def become(module: Any, mixin: type[AdapterModule], switch: Switch) -> None:
    """Make `module` an instance of `mixin`, in front of what other adapters have put there (see `outermost`)."""
    if isinstance(module, mixin):
        return
    lifted: list[Any] = []
    while not mixin.outermost and vars(type(module).__mro__[1]).get("outermost"):
        lifted.append(type(module).__mro__[1])
        mix_out(module)
    for one in (mixin, *reversed(lifted)):
        mix_in(module, one, f"{one.name_prefix}{type(module).__name__}")
    module.attach(switch)


def tell_quantizer(model: nn.Module, attached: bool) -> None:
    """transformers trains a quantized model only when its quantizer says it is trainable: with an adapter it is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer._minipeft_attached = attached


def freeze(model: nn.Module) -> None:
    """Turn off the gradient of every parameter."""
    for parameter in model.parameters():
        parameter.requires_grad = False


def check_adapter_name(adapter: str) -> None:
    """Raise ValueError unless `adapter` can be part of parameter names and be a folder's name."""
    if not isinstance(adapter, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", adapter):
        raise ValueError(f"adapter name {adapter!r} must be made of letters, digits, '_' and '-'")
    if hasattr(nn.ModuleDict(), adapter) or hasattr(nn.ParameterDict(), adapter):
        raise ValueError(f"adapter name {adapter!r} is the name of something in torch's modules; take another")


def _check_saved(model: nn.Module, saved: list[str]) -> None:
    for path in saved:
        module = model.get_submodule(path)
        if isinstance(module, AdapterModule) and not isinstance(module, TrainedModule):
            raise ValueError(f"modules_to_save: {path!r} already carries another adapter's {type(module).__name__}")
        inside = [
            (f"{path}.{name}".strip("."), p) for path, m in base_modules(module) for name, p in m._parameters.items()
        ]
        packed = [name for name, p in inside if p is not None and not p.is_floating_point()]
        if packed:
            raise ValueError(f"modules_to_save: {path!r} is quantized ({packed[0]}), so it cannot be trained whole")


def _copies(module: AdapterModule) -> Any:
    return module.modules_to_save if isinstance(module, TrainedModule) else ()


def _train_all_biases(model: nn.Module, adapter: str, switch: Switch, autocast: bool) -> None:
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
    packed = next((m for _, m in base_modules(module) if isinstance(m, NF4Linear)), None)
    own = packed.weight_dtype if packed is not None else next(p.dtype for p in module.parameters())
    return torch.float32 if autocast and own in (torch.float16, torch.bfloat16) else own

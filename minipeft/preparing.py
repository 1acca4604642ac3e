"""PEFT's functions that prepare a model or inject an adapter into it, without making it a `PeftModel`."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.attach import (
    adapter_modules,
    adapter_parameters,
    attach_adapter,
    check_adapter,
    set_trainable,
    switch_of,
)
from minipeft.compat import checkpoint_activations
from minipeft.meta import take_memory
from minipeft.methods import method_of
from minipeft.targets import plain_module_names

# In front of the names of a model that torch.compile wraps.
_COMPILED = "_orig_mod."


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Freeze `model` and put the adapter's modules into it, active, without giving the model `PeftModel`'s methods.

    Adapters that it has already keep their gradients, but do not act any more.

    Args:
        low_cpu_mem_usage: Leave the adapter's tensors on the meta device until values are loaded.
        state_dict: Tensors of an adapter of this method: the adapter goes to the modules that they name, with a warning
            where the config says others. They are not loaded (`set_peft_model_state_dict`).

    Raises ValueError when the config or `state_dict` does not fit the model; it is then as before, but for its frozen
    parameters.
    """
    config = copy.deepcopy(peft_config)
    freeze(model)
    if state_dict is not None:
        aim_by_state(model, config, adapter_name, state_dict)
    switch = switch_of(model)
    with reshaped(model, config):
        attach_adapter(model, config, adapter_name, switch, init=not low_cpu_mem_usage)
    if low_cpu_mem_usage:
        take_memory(model, adapter_name)
    switch.active = (adapter_name,)
    set_trainable(model, adapter_name, not peft_config.inference_mode)
    return model


def aim_by_state(model: nn.Module, config: Any, adapter: str, state_dict: Mapping[str, Tensor]) -> None:
    """Let `config` take exactly the modules that `state_dict` has tensors for, named with or without PEFT's prefix.

    Warns, as PEFT does, of modules that only one of the two names.

    Raises ValueError for a config whose adapters do not lie at modules by names, or aim at parameters, for a state that
    names no module, and when the config itself does not fit the model.
    """
    start = method_of(str(config.type_name)).prefix
    if start is None or not hasattr(config, "target_modules"):
        raise ValueError(f"state_dict: adapters of {type(config).__name__} do not go to modules that tensors name")
    if getattr(config, "target_parameters", None):
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`: by their "
            "names, the tensors of a parameter and of its module look alike; leave state_dict out"
        )
    plain = (key.replace(_COMPILED, "").removeprefix(config.key_prefix) for key in state_dict if f".{start}" in key)
    named = {key.rpartition(f".{start}")[0].partition(".base_layer")[0] for key in plain}
    _, wanted, _ = check_adapter(model, copy.deepcopy(config), adapter, init=False)
    found = [path for path in plain_module_names(model) if path.replace(_COMPILED, "") in named]
    if not found:
        raise ValueError(f"state_dict names no module of {type(model).__name__}, but {sorted(named)[:3]}")
    only = {
        "PEFT config": sorted(set(wanted) - set(found)),
        "state_dict": sorted({*found, *(named - {path.replace(_COMPILED, "") for path in found})} - set(wanted)),
    }
    if any(only.values()):
        told = (
            f"The {who} contained these additional target modules: {names}. " for who, names in only.items() if names
        )
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            f"{''.join(told)}The adapter goes to those of the state_dict.",
            RuntimeWarning,
            stacklevel=3,
        )
    config.target_modules = "|".join(map(re.escape, found))
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, field):
            setattr(config, field, None)


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze `model` and, unless told not to, turn on gradient checkpointing (non-reentrant).

    PEFT also converts every 16-bit parameter to float32, embeddings and head included, which can cost gigabytes.
    Frozen parameters gain nothing from that: they stay as they are; adapters are float32 anyway.

    Args:
        auto_clear_cache: Give the memory that loading and packing the weights has freed back to the GPU.
    """
    freeze(model)
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant"):
            model.enable_input_require_grads()
        checkpoint_activations(model, **options)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def prepare_model_for_gradient_checkpointing(adapted: Any, model: Any) -> None:
    """Let the embeddings' outputs get gradients, without which reentrant checkpointing would give adapters none.

    Args:
        adapted: The model that has this as a method (PEFT's).
        model: The model to prepare, most often the same.

    Raises AttributeError for a model that names no embeddings.
    """
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))


def freeze(model: nn.Module) -> None:
    """Turn off the gradient of every parameter that is not an adapter's."""
    own = {id(parameter) for _, parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad = False


def warn_of_adapters(model: Any, adapter: str) -> None:
    """Warn of a model that has adapters already, as when a notebook's cell runs again."""
    names = sorted({name for _, module in adapter_modules(model) for name in module.adapter_names()})
    if not names:
        return
    gone, others = f"{adapter!r} is replaced by a new one, what it learned is lost", ", ".join(map(repr, names))
    fate = gone if adapter in names else f"{others} does not act any more until set again"
    warnings.warn(
        f"You are trying to modify a model with PEFT for a second time: of its adapters {names}, {fate}. "
        "For the plain model, call .unload() first.",
        stacklevel=3,
    )


@contextlib.contextmanager
def reshaped(model: nn.Module, config: Any) -> Iterator[None]:
    """The base model as `config` wants it (`PeftConfig.reshape`), from now on; as before if the block fails.

    Raises ValueError where it cannot be so.
    """
    undo = config.reshape(model)
    try:
        yield
    except BaseException:
        undo()
        raise


def supports_lora_conversion(adapted: Any, adapter_name: str = "default") -> bool:
    """False: minipeft does not make LoRA adapters of others (PEFT's `convert_to_lora`)."""
    return False


def tell_quantizer(model: nn.Module, attached: bool) -> None:
    """Tell transformers' quantizer if there is an adapter: only then may a quantized model be trained."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer._minipeft_attached = attached

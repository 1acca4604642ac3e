"""PEFT's functions that prepare a model or inject an adapter into it, without making it a `PeftModel`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.attach import adapter_modules, adapter_parameters, attach_adapter, set_trainable, switch_of


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Freeze `model` and put the adapter's modules into it, active, without giving the model `PeftModel`'s methods.

    Adapters that it has already keep their gradients, but do not act any more.

    Raises ValueError for `state_dict` (PEFT takes the targets from it; name them in the config).
    """
    if state_dict is not None:
        raise ValueError("inject_adapter_in_model(state_dict=...) is not supported; name the targets in the config")
    freeze(model)
    switch = switch_of(model)
    attach_adapter(model, copy.deepcopy(peft_config), adapter_name, switch)
    switch.active = (adapter_name,)
    set_trainable(model, adapter_name, not peft_config.inference_mode)
    return model


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
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            model.enable_input_require_grads()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
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


def supports_lora_conversion(adapted: Any, adapter_name: str = "default") -> bool:
    """False: minipeft does not make LoRA adapters of others (PEFT's `convert_to_lora`)."""
    return False


def tell_quantizer(model: nn.Module, attached: bool) -> None:
    """Tell transformers' quantizer if there is an adapter: only then may a quantized model be trained."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer._minipeft_attached = attached

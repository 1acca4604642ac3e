"""The adapters attached to a model: PEFT's `get_layer_status` and `get_model_status`, and counts of parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from minipeft.adapter import AdaptedModel, AdapterModule, WrappedForward
from minipeft.attach import adapter_modules
from minipeft.biases import TrainedBias
from minipeft.copies import Replaced, TrainedPart, TrainedSequence
from minipeft.fused import CallsItsParts
from minipeft.methods import method_of
from minipeft.mixins import plain_class
from minipeft.packed import Packed, numbers_of

IRREGULAR = "irregular"
# The mixins that are no method's, and no module's that is trained whole.
_BESIDE_METHODS = (TrainedBias, WrappedForward, CallsItsParts, TrainedPart, TrainedSequence, Replaced, AdapterModule)


@dataclasses.dataclass(frozen=True)
class LayerStatus:
    """One adapted module. Dictionaries are keyed by adapter name.

    Attributes:
        name: Its dotted name, from PEFT's `model.base_model` for a `PeftModel`.
        module_type: PEFT's word for it, such as "lora.Linear".
        requires_grad: "irregular" for an adapter some of whose tensors here get gradients and others not.
        quantization_backend: What packs its weight; None for a dense one.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclasses.dataclass(frozen=True)
class ModelStatus:
    """The whole model; a field is "irregular" where its modules differ.

    Attributes:
        base_model_type: The model's class; "other" for a model that is neither a `PeftModel` nor transformers'.
        adapter_model_type: PEFT's word for the method, such as "LoraModel"; "None" for no `PeftModel`.
        peft_types: adapter -> method; empty for no `PeftModel`.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters with a gradient, all parameters); a packed weight counts all the numbers that it stands for."""
    packed = numbers_of(model)
    total = sum(packed.get(id(p), p.numel()) for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total


def print_parameters(model: nn.Module) -> None:
    """Print the two numbers of `count_parameters` and their ratio."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")


def get_layer_status(model: Any) -> list[LayerStatus]:
    """The status of every adapted module, in the model's order; those of which a bias alone is trained are left out.

    Raises ValueError for a model without any.
    """
    model = getattr(model, "_orig_mod", model)
    start = "model." if isinstance(model, AdaptedModel) else ""
    layers = [
        _status_of(f"{start}{path}".rstrip("."), module)
        for path, module in adapter_modules(model)
        if _mixin_of(module) is not None
    ]
    if not layers:
        raise ValueError(
            f"No adapter layers found in the model, a {type(model).__name__}: attach an adapter first, by "
            "get_peft_model or inject_adapter_in_model"
        )
    return layers


def get_model_status(model: Any) -> ModelStatus:
    """The status of a model with adapters.

    Raises ValueError for a model without them.
    """
    model = getattr(model, "_orig_mod", model)
    layers = get_layer_status(model)
    whole = isinstance(model, AdaptedModel)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    having = {n: [layer for layer in layers if n in layer.available_adapters] for n in names}
    configs = model.peft_config if whole else {}
    methods = [method_of(configs[name].type_name).name for name in configs]
    is_known = whole or plain_class(model).__module__.startswith("transformers.")
    trainable, total = count_parameters(model)
    return ModelStatus(
        base_model_type=plain_class(model).__name__ if is_known else "other",
        adapter_model_type=f"{methods[0].capitalize()}Model" if methods else "None",
        peft_types={name: configs[name].type_name for name in configs},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common([layer.enabled for layer in layers]),
        active_adapters=_common([layer.active_adapters for layer in layers]),
        merged_adapters=_merged(having),
        requires_grad={n: _common([layer.requires_grad[n] for layer in having[n]]) for n in names},
        available_adapters=names,
        devices={n: sorted({d for layer in having[n] for d in layer.devices[n]}) for n in names},
        quantization_backend=_common([layer.quantization_backend for layer in layers]),
    )


def _status_of(name: str, module: AdapterModule) -> LayerStatus:
    adapters = sorted(module.adapter_names())
    # And what somebody put into a holder by hand, as PEFT counts it.
    tensors = {a: [*module.adapter_state(a).values(), *_held(module, a)] for a in adapters}
    trained = {
        adapter: [t.requires_grad for t in own if isinstance(t, nn.Parameter) and t.is_floating_point()]
        for adapter, own in tensors.items()
    }
    mixin: Any = _mixin_of(module)
    room = mixin.__module__.split(".")[1] if mixin.__module__.startswith("minipeft.") else mixin.__module__
    return LayerStatus(
        name=name,
        module_type=mixin.peft_name or f"{room}.{mixin.__name__.removeprefix(room.capitalize())}",
        enabled=module.switch.enabled,
        active_adapters=module.active_adapters,
        merged_adapters=[adapter for adapter in module.merged_adapters if adapter in adapters],
        requires_grad={adapter: _common(flags or [False]) for adapter, flags in trained.items()},
        available_adapters=adapters,
        devices={adapter: sorted({str(t.device) for t in own}) for adapter, own in tensors.items()},
        quantization_backend="nf4" if isinstance(module, Packed) else None,
    )


def _held(module: AdapterModule, adapter: str) -> list[nn.Parameter]:
    """The parameters in the holders of the module (`lora_A` and its like) that are keyed by `adapter`."""
    found = []
    for name in module.adapter_layer_names:
        holder: Any = getattr(module, name, {})
        if adapter in holder:
            held = holder[adapter]
            found += list(held.parameters()) if isinstance(held, nn.Module) else [held]
    return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]


def _mixin_of(module: AdapterModule) -> Any:
    """The class that adapts the module, the front one of several; None if only its bias is trained."""
    mixins = [cls for cls in type(module).__mro__ if issubclass(cls, AdapterModule) and "_plain_class" not in vars(cls)]
    return next((cls for cls in mixins if cls not in _BESIDE_METHODS), None)


def _merged(having: dict[str, list[LayerStatus]]) -> Any:
    """The adapters that are merged in all of their layers; "irregular" if one is merged in some of them."""
    merged = {name: _common([name in layer.merged_adapters for layer in having[name]]) for name in having}
    return IRREGULAR if IRREGULAR in merged.values() else [name for name in having if merged[name]]


def _common(values: list[Any]) -> Any:
    """The value that all have; "irregular" if they differ."""
    return values[0] if all(value == values[0] for value in values) else IRREGULAR

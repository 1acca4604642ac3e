"""The paths of PEFT's wrapper, through a model that has no wrapper.

A script for PEFT finds the adapted model as `model.base_model.model` and the verbs of the method's own wrapper at
`model.base_model`. Here both lead back to the model itself, by attributes that its class gets where it has none of that
name: nothing is registered twice, so `state_dict`, `named_modules` and `parameters` are as they were.

transformers' models have a `base_model` of their own, the part without the head. There it stays that part, which gets
the verbs too (`Backbone`), `model`, the way back, and the other parts of the model (`model.base_model.lm_head`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

from minipeft.adapter import AdaptedModel
from minipeft.attach import adapter_modules
from minipeft.dispatched import follow_class
from minipeft.methods import METHODS, Registration, method_of
from minipeft.mixins import Face, mix_in
from minipeft.tying import tied_with_embedding


class Offered:
    """An attribute computed from the object; whatever is set under its name later stands before it."""

    def __init__(self, name: str, value: Callable[[Any], Any]):
        self.name, self.value = name, value

    def __get__(self, obj: Any, kind: Any = None) -> Any:
        if obj is None:
            return self
        return obj._modules[self.name] if self.name in obj._modules else self.value(obj)


def offered_by_model(name: str) -> Offered:
    """The attribute `name` of an adapted model."""
    if name in _OF_MODEL:
        return Offered(name, _OF_MODEL[name])
    if name in _of_methods():
        return Offered(name, functools.partial(_of_method, name))
    return Offered(name, operator.attrgetter(f"base_model.{name}"))


def offers_to(obj: Any, kind: type[Face]) -> tuple[str, ...]:
    """The attributes that `obj`, which is to become a `kind`, lacks."""
    names = {*_OF_MODEL, *_of_methods(), *_parts_beside(obj)} if issubclass(kind, AdaptedModel) else set(_OF_BACKBONE)
    lacking = tuple(name for name in sorted(names) if not hasattr(obj, name))
    return (*lacking, "base_model") if kind is Backbone and hasattr(obj, "base_model_prefix") else lacking


def _of_methods() -> set[str]:
    return {name for method in METHODS.values() for name in method.attributes}


def _parts_beside(model: Any) -> set[str]:
    """The parts of a backbone called `model`: PEFT's `model.model.model.layers` looks for them in the whole model.

    Without those by whose presence transformers tells what the whole model is, or that it sets by name.
    """
    backbone = model._modules.get("model")
    own: Any = getattr(backbone, "_modules", ()) if backbone is getattr(model, "base_model", None) else ()
    return {name for name in own if name in ("layers", "norm", "final_layer_norm", "rotary_emb")}


def become_backbone(model: AdaptedModel) -> None:
    """Give the part of `model` that it calls `base_model`, if it is one, the verbs of PEFT's `base_model`."""
    follow_class(model)
    part: Any = model.base_model
    inside = any(module is part for module in model.modules() if module is not model)
    if inside and not isinstance(part, Face | torch.jit.ScriptModule):
        beside = [name for name in model._modules if not hasattr(part, name)]
        # Which transformers would take for a head of the part.
        hidden = (
            ["get_output_embeddings"] if "lm_head" in beside and _has_default(part, "get_output_embeddings") else []
        )
        mix_in(part, Backbone, (*offers_to(part, Backbone), *beside, *hidden))
        # Past nn.Module, which would register the model as a part of its part.
        vars(part)["_adapted_model"] = model


def _has_default(part: Any, name: str) -> bool:
    """True if `part` has the method `name` from transformers' base classes."""
    return str(getattr(getattr(part, name, None), "__module__", "")) == "transformers.modeling_utils"


def _of_method(name: str, model: AdaptedModel) -> Any:
    """The attribute `name` that a method gives a model, by the first of the adapters whose method has it."""
    for method in _methods(model):
        if name in method.attributes:
            return method.load(name)(model)
    raise AttributeError(f"the adapters of this {type(model).__name__} have no {name!r}")


def _prefix(model: AdaptedModel) -> str:
    """The start of the names of the adapters' tensors."""
    prefix = next((method.prefix for method in _methods(model) if method.prefix), None)
    if prefix is None:
        raise AttributeError(f"the tensors of the adapters of this {type(model).__name__} have no prefix in common")
    return prefix


def _methods(model: AdaptedModel) -> list[Registration]:
    """The methods of a model's adapters, those that act first."""
    names = sorted(model.peft_config, key=lambda adapter: adapter not in model._switch.active)
    return [method_of(str(model.peft_config[adapter].type_name)) for adapter in names]


def _targeted_modules(model: AdaptedModel) -> list[str]:
    """The dotted names of the modules that adapters go to, in the model's order."""
    targets = {path for adapter in model._targets for path in model._targets[adapter]}
    return [path for path, _ in adapter_modules(model) if path in targets - _holders(model).keys()]


def _targeted_parameters(model: AdaptedModel) -> list[str]:
    """The dotted names of the parameters that adapters go to (`target_parameters`), in the model's order."""
    return [f"{path}.{name}".lstrip(".") for path, names in _holders(model).items() for name in names]


def _holders(model: AdaptedModel) -> dict[str, list[str]]:
    """Module -> its parameters that adapters were aimed at."""
    found = {
        path: [*dict.fromkeys(name for adapter in model.peft_config for name in module.parameter_targets(adapter))]
        for path, module in adapter_modules(model)
    }
    return {path: names for path, names in found.items() if names}


def _modules_to_save(model: AdaptedModel) -> set[str] | None:
    """The names of all adapters' `modules_to_save`."""
    configs = model.peft_config.values()
    return {name for config in configs for name in getattr(config, "modules_to_save", None) or ()} or None


class View:
    """An adapted model as PEFT's `base_model`: its attributes, but that `model` is the adapted model itself.

    For models with a part called `model`, which PEFT's script finds one step further on.
    """

    def __init__(self, model: Any) -> None:
        vars(self)["model"] = model

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # a copy in the making has none yet
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


_OF_MODEL: dict[str, Callable[[Any], Any]] = {
    "_get_module_names_tied_with_embedding": lambda model: functools.partial(tied_with_embedding, model),
    "base_model": lambda model: View(model) if "model" in model._modules else model,
    "model": lambda model: model,
    "modules_to_save": _modules_to_save,
    "peft_type": lambda model: next(iter(model.peft_config.values())).peft_type,
    "prefix": _prefix,
    "targeted_module_names": _targeted_modules,
    "targeted_parameter_names": _targeted_parameters,
}

_OF_BACKBONE = ("model", "peft_type", "prefix", "targeted_module_names", "targeted_parameter_names")


class Backbone(Face):
    """The part of an adapted model that the model calls `base_model`, with the verbs of PEFT's `base_model`."""

    _adapted_model: Any

    @classmethod
    def offer(cls, name: str) -> Offered:
        if name == "base_model":
            # As transformers has it: it would take the attribute `model` for a part of that name.
            return Offered(name, lambda part: part._modules.get(part.base_model_prefix, part))
        if name == "get_output_embeddings":
            return Offered(name, lambda part: lambda: None)
        return Offered(name, operator.attrgetter("_adapted_model" if name == "model" else f"_adapted_model.{name}"))


def _verb(name: str) -> property:
    return property(operator.attrgetter(f"_adapted_model.{name}"), doc=f"`{name}` of the adapted model.")


for _name in (
    *("peft_config", "active_adapter", "active_adapters", "set_adapter", "set_requires_grad", "add_adapter"),
    *("load_adapter", "delete_adapter", "add_weighted_adapter", "enable_adapter_layers", "disable_adapter_layers"),
    *("merge_adapter", "unmerge_adapter", "merge_and_unload", "unload"),
):
    setattr(Backbone, _name, _verb(_name))

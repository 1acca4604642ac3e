"""PEFT's classes of wrappers, for `isinstance`: here nothing is wrapped, and adapted objects are instances of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from minipeft.adapter import AdapterModule
from minipeft.mixins import Face
from minipeft.model import PeftModel, get_peft_model

# What stands for the config of a model that has none.
DUMMY_MODEL_CONFIG = {"model_type": "custom"}


class _Described(type):
    """The type of a class whose instances are described, not derived from it."""

    includes: Callable[[type], bool]

    def __instancecheck__(cls, obj: object) -> bool:
        return cls.includes(type(obj))

    def __subclasscheck__(cls, other: type) -> bool:
        return other is cls or cls.includes(other)


class BaseTunerLayer(metaclass=_Described):
    """A module with adapters of some method.

    Modules that are only trained whole, or whose bias is (`modules_to_save`, `bias`), are none, as in PEFT.
    """

    @staticmethod
    def includes(other: type) -> bool:
        """True for classes with a method's mixin, which is one that adds adapters, in front."""
        return issubclass(other, AdapterModule) and any("add_adapter" in vars(base) for base in other.__mro__)


class BaseTuner(metaclass=_Described):
    """A model with adapters: in PEFT, what `model.base_model` is."""

    @staticmethod
    def includes(other: type) -> bool:
        """True for classes with `PeftModel`, or what leads to it (`paths.Backbone`), in front."""
        return issubclass(other, Face)

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """The `config` of a model as a dictionary; {"model_type": "custom"} for a model without one."""
        config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        is_fields = dataclasses.is_dataclass(config) and not isinstance(config, type)
        return dataclasses.asdict(config) if is_fields else config


class PeftMixedModel(PeftModel):
    """PEFT's model for adapters of several methods: here every `PeftModel` is one, and calling it makes one."""

    def __new__(cls, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
        """`get_peft_model(model, peft_config, adapter_name)`."""
        return get_peft_model(model, peft_config, adapter_name, **kwargs)

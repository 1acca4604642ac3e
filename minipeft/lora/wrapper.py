"""`LoraModel`: PEFT's wrapper of a model with LoRA, which here is the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipeft.lora.config import LoraConfig
from minipeft.model import get_peft_model


class _OfLora(type):
    def __instancecheck__(cls, model: Any) -> bool:
        configs = getattr(model, "peft_config", None)
        return isinstance(configs, Mapping) and any(isinstance(config, LoraConfig) for config in configs.values())


class LoraModel(metaclass=_OfLora):
    """Any model with LoRA adapters is an instance; calling the class makes one, as `get_peft_model` does."""

    prefix = "lora_"
    # No tensor is shared by several layers (PEFT's word for methods such as VeRA).
    uses_shared_state = False

    def __new__(cls, model: Any, config: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
        """The model with a new adapter.

        Args:
            config: A `LoraConfig`, or a dictionary from adapter names to them.
            kwargs: Further arguments of `get_peft_model`.

        Raises as `get_peft_model`, and KeyError when the dictionary lacks `adapter_name`.
        """
        return get_peft_model(
            model, config[adapter_name] if isinstance(config, Mapping) else config, adapter_name, **kwargs
        )

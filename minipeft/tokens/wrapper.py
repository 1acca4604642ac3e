"""`TrainableTokensModel`: PEFT's wrapper of a model with trained rows, which here is the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minipeft.copies import TrainedModule
from minipeft.model import get_peft_model
from minipeft.tokens.config import TrainableTokensConfig
from minipeft.tokens.layer import TrainedRows


class _OfRows(type):
    def __instancecheck__(cls, model: Any) -> bool:
        configs = getattr(model, "peft_config", None)
        own = TrainableTokensConfig
        return isinstance(configs, Mapping) and any(isinstance(config, own) for config in configs.values())


class _Beside(type):
    def __instancecheck__(cls, module: Any) -> bool:
        return isinstance(module, TrainedModule | TrainedRows)


class AuxiliaryTrainingWrapper(metaclass=_Beside):
    """PEFT's class of what is trained beside the method: modules trained whole, or rows of them, are instances."""


class TrainableTokensModel(metaclass=_OfRows):
    """Any model with an adapter of this method is an instance; calling the class makes one, as `get_peft_model`."""

    prefix = "trainable_tokens_"
    # No tensor is shared by several layers (PEFT's word for methods such as VeRA).
    uses_shared_state = False

    def __new__(cls, model: Any, config: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
        """The model with a new adapter; arguments and errors as those of `minipeft.lora.wrapper.LoraModel`."""
        own = config[adapter_name] if isinstance(config, Mapping) else config
        return get_peft_model(model, own, adapter_name, **kwargs)

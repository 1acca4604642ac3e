"""How long a text may be: the positions that a model has, less those that virtual tokens take."""

from __future__ import annotations

from typing import Any

from minipeft.train.errors import ConfigError
from minipeft.train.models import load_text_config

DEFAULT_MAX_LENGTH = 1024


def resolve_max_length(max_length: int | None, model_limit: int | None, virtual: int = 0) -> int:
    """The longest sequence that may be trained on.

    Args:
        virtual: how many of the model's positions virtual tokens take, see `text_positions`.

    Raises:
        ConfigError: `max_length` is greater than the positions the model has for a text.
    """
    limit = None if model_limit is None else model_limit - virtual
    if limit is not None and limit < 1:
        room = f"the model's max_position_embeddings ({model_limit})"
        raise ConfigError(f"{virtual} virtual tokens leave no room for a text in {room}: give fewer")
    if max_length is None:
        return DEFAULT_MAX_LENGTH if limit is None else min(DEFAULT_MAX_LENGTH, limit)
    if limit is not None and max_length > limit:
        less = f" less {virtual} virtual tokens" if virtual else ""
        message = f"max_length ({max_length}) exceeds the model's max_position_embeddings ({model_limit}){less}"
        raise ConfigError(f"{message}: set max_length to {limit} or less")
    return max_length


def model_position_limit(model: Any) -> int | None:
    """`max_position_embeddings` of the model's (text) config, or None where it has no such limit."""
    config = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def text_positions(model: str, adapter_config: Any = None) -> tuple[int | None, int]:
    """The positions that a model has (None: no limit), and how many of them an adapter's virtual tokens take.

    Args:
        model: directory, hub name or .gguf file; its config alone is read.

    Raises:
        ModelLoadError: there is none.
    """
    config = load_text_config(model)
    taken = 0 if adapter_config is None else adapter_config.positions_taken(config.model_type)
    return getattr(config, "max_position_embeddings", None), taken

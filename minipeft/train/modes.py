"""The mode a model is in: evaluating or training, with activations kept or recomputed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """`model.eval()` inside, the mode it was in afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def training_mode(model: Any, gradient_checkpointing: bool = False) -> Iterator[None]:
    """`model.train()` inside, the mode it was in afterwards.

    Args:
        gradient_checkpointing: recompute activations in backward, the non-reentrant way: the other one would need
            inputs that require gradients. transformers calls it activation checkpointing since 5.23.
    """
    was_training = model.training
    model.train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if gradient_checkpointing:
            model.activation_checkpointing_disable()
        model.train(was_training)

"""PEFT's functions that give an adapted model's verbs the signatures of the plain model's.

In PEFT the wrapper's `forward(*args, **kwargs)` hides them. Here the model's own methods are called, so nothing is
hidden: the functions check what they are given.
"""

from __future__ import annotations

import inspect
from typing import Any


def update_signature(model: Any, method: str = "all") -> None:
    """Do nothing to `model`, whose `forward` and `generate` have their own signatures already.

    Args:
        method: "forward", "generate" or "all".

    Raises ValueError for another `method`.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method must be 'forward', 'generate' or 'all', got {method!r}")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def update_forward_signature(model: Any) -> None:
    """Do nothing to `model`, whose `forward` has its own signature."""
    inspect.signature(model.forward)


def update_generate_signature(model: Any) -> None:
    """Do nothing to `model`, whose `generate`, if it has one, has its own signature."""
    if hasattr(model, "generate"):
        inspect.signature(model.generate)

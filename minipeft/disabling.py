"""Being the base model for a while: adapters off and on again, with their gradients."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

from minipeft.adapter import AdaptedModel
from minipeft.attach import adapter_modules, adapter_parameters, set_enabled, unmerge
from minipeft.merge import merge, merged_adapters


def disable(model: AdaptedModel) -> None:
    """Be the base model until `enable`: merged adapters are unmerged, and no adapter gets gradients."""
    unmerge(model)
    set_enabled(model, False)
    model._switch.paused += _stop_learning(model)


def enable(model: AdaptedModel) -> None:
    """Let the adapters act again, with the gradients that they had."""
    set_enabled(model, True)
    for parameter in model._switch.paused:
        parameter.requires_grad_(True)
    model._switch.paused = []


@contextlib.contextmanager
def adapters_off(model: AdaptedModel) -> Iterator[None]:
    """Inside the block the model is the base model; after it all is as before, merged adapters and gradients too.

    But modules that were enabled or disabled by themselves are then as the model; a warning says so.
    """
    merged, enabled = merged_adapters(model), model._switch.enabled
    unmerge(model)
    if any(module.switch.enabled != enabled for _, module in adapter_modules(model)):
        warnings.warn(
            "The model contains some adapter layers that are enabled and others that are disabled: after "
            f"disable_adapter() all of them are {'enabled' if enabled else 'disabled'}, as the model is",
            stacklevel=3,
        )
    set_enabled(model, False)
    learning = _stop_learning(model)
    try:
        yield
    finally:
        set_enabled(model, enabled)
        for parameter in learning:
            parameter.requires_grad_(True)
        if merged:
            merge(model, merged)


def _stop_learning(model: AdaptedModel) -> list[nn.Parameter]:
    """Turn the gradients of all adapters off. Returns the parameters that had them."""
    learning = [parameter for _, parameter in adapter_parameters(model) if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    return learning

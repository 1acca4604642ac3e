"""Biases in a stored adapter whose config trains none: PEFT writes them into the base, here the adapter gets them.

So they act as in PEFT, and the base model stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from minipeft.attach import adapter_modules, adapter_parameters, switch_of, train_biases
from minipeft.biases import TrainedBias


@contextlib.contextmanager
def room_for_biases(
    model: nn.Module, adapter: str, stored: Mapping[str, Tensor], tensors: Callable[[], Mapping[str, Tensor]]
) -> Iterator[None]:
    """Let `adapter` train biases, if `stored` has some that it does not train.

    That is if they are those of all modules that it adapts ("lora_only"), or of all modules ("all"); its config says so
    from then on. If the block fails, all is as before.

    Args:
        tensors: () -> the live tensors of `adapter` by their names on disk.
    """
    biases = {name for name in stored if name.endswith("bias")}
    if not biases or biases <= tensors().keys():
        yield
        return
    before = set(_with_bias_of(model, adapter))
    learns = any(parameter.requires_grad for _, parameter in adapter_parameters(model, {adapter}))
    try:
        train_biases(model, adapter, switch_of(model))
        names = {id(tensor): name for name, tensor in tensors().items()}
        new = {module for module in _with_bias_of(model, adapter) if module not in before}
        adapted = {module for module in new if getattr(module, "adapts", _never)(adapter)}
        wanted = {module for module in new if names[id(module.trained_bias[adapter])] in stored}
        kind = "lora_only" if wanted == adapted else "all" if wanted == new else None
        kind = kind if wanted else None
        for module in new:
            if kind is None or module not in wanted:
                del module.trained_bias[adapter]
            else:
                module.trained_bias[adapter].requires_grad_(learns)
        yield
    except BaseException:
        for module in _with_bias_of(model, adapter):
            if module not in before:
                del module.trained_bias[adapter]
        raise
    config: Any = getattr(model, "peft_config", {}).get(adapter)
    if kind is not None and hasattr(config, "bias"):
        config.bias = kind


def _never(adapter: str) -> bool:
    return False


def _with_bias_of(model: nn.Module, adapter: str) -> list[Any]:
    return [m for _, m in adapter_modules(model) if isinstance(m, TrainedBias) and adapter in m.trained_bias]

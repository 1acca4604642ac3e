"""The optimizer and the learning-rate schedule that a config asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from minipeft.methods import optional_part
from minipeft.optim import PagedAdamW
from minipeft.train.config import TrainConfig
from minipeft.train.errors import ConfigError


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters that require a gradient, by name.

    Raises:
        ValueError: there is none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter: attach an adapter with get_peft_model first")
    return parameters


# The arguments of PagedAdamW that `optimizer_args` may hold: the rest are settings of their own, or do not go with
# accumulated and clipped gradients.
MEMORY_SETTINGS = ("page_bytes", "device_budget", "host_budget", "spill_dir")


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices only, not on biases and magnitudes.

    With `loraplus_lr_ratio`, LoRA's factors B learn faster than the rest (see `lora/rates.py`).

    Raises:
        ConfigError: `optimizer_args` that the optimizer does not take; `loraplus_lr_ratio` without LoRA.
    """
    parameters = trainable_parameters(model).values()
    if config.loraplus_lr_ratio is None:
        groups = _plain_groups(parameters, config)
    else:
        types = [adapter.type_name for adapter in getattr(model, "peft_config", {}).values()]
        groups_by_rate = optional_part("rates", types)
        try:
            groups = groups_by_rate(model, config.lr, config.loraplus_lr_ratio, config.weight_decay)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.optimizer == "adamw":
        if config.optimizer_args:
            raise ConfigError(f"optimizer adamw takes no optimizer_args, got {config.optimizer_args}")
        return torch.optim.AdamW(groups, **settings)
    bits = 8 if config.optimizer == "paged_adamw_8bit" else 32
    try:
        return PagedAdamW(groups, **settings, state_bits=bits, **_memory(config.optimizer_args))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {config.optimizer} with {config.optimizer_args}: {error}") from None


def _plain_groups(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _memory(args: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in args if name not in MEMORY_SETTINGS]
    if unknown:
        raise ValueError(f"unknown optimizer_args {unknown}; there are {', '.join(MEMORY_SETTINGS)}")
    # In YAML 1e9 is a float, or a string; both mean a whole number of bytes.
    whole = [name for name in args if name != "spill_dir" and args[name] is not None]
    return {**args, **{name: _bytes(name, args[name]) for name in whole}}


def _bytes(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number of bytes, got {value!r}")


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
    """The schedule that transformers knows under `config.scheduler`.

    Raises:
        ConfigError: the schedule does not take `config.scheduler_args`.
    """
    warmup = config.warmup_steps
    if warmup is None:
        # Never all steps: a warm-up starts from a rate of 0, by which a run of one step would learn nothing.
        warmup = min(math.ceil(config.warmup_ratio * total_steps), total_steps - 1)
    try:
        return get_scheduler(
            config.scheduler,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(config.scheduler_args),
        )
    except (TypeError, ValueError) as error:
        message = f"schedule {config.scheduler!r} refuses scheduler_args {config.scheduler_args}: {error}"
        raise ConfigError(message) from None

"""The optimizer and the learning-rate schedule that a config asks for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from minipeft.training.config import TrainConfig
from minipeft.training.errors import ConfigError


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters that require a gradient, by name.

    Raises:
        ValueError: there is none.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter: attach an adapter with get_peft_model first")
    return parameters


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices only, not on biases and magnitudes."""
    parameters = trainable_parameters(model).values()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LRScheduler:
    """The schedule that transformers knows under `config.scheduler`.

    Raises:
        ConfigError: the schedule does not take `config.scheduler_args`.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps)
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

"""Errors that PagedAdamW raises for arguments, parameters and devices that it does not take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DEVICE_TYPES = ("cpu", "cuda")
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameter_name(group: dict[str, Any], number: int, index: int) -> str:
    """The name of the parameter at `index` of group `number`, for messages."""
    names = group.get("param_names")
    # Code that moves parameters between groups seldom moves their names.
    which = repr(names[index]) if names and len(names) == len(group["params"]) else f"{index} of group {number}"
    return f"parameter {which} {tuple(group['params'][index].shape)}"


def check_supported(group: dict[str, Any]) -> None:
    """Raise ValueError for settings of a parameter group that are not supported."""
    for name in ("amsgrad", "capturable", "differentiable"):
        if group.get(name):
            raise ValueError(f"PagedAdamW does not support {name}={group[name]!r}: leave it False")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("PagedAdamW decays weights apart from the gradient, this is a group of torch.optim.Adam")


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for settings of a parameter group that are out of range or not supported."""
    check_supported(group)
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must be 0 or greater, got {group[name]}")
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")


def check_parameter(p: Tensor, name: str) -> None:
    """Raise TypeError for a parameter that cannot be updated."""
    if p.dtype not in PARAMETER_DTYPES:
        raise TypeError(f"{name} is {p.dtype}: PagedAdamW updates {', '.join(map(str, PARAMETER_DTYPES))}")


def common_device(parameters: Iterable[Tensor]) -> torch.device:
    """The device of all parameters.

    Raises:
        ValueError: they are on several devices, or on one whose memory cannot be paged.
    """
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"PagedAdamW updates parameters on one device, these are on {names}: use one for each")
    (device,) = devices
    if device.type not in DEVICE_TYPES:
        raise ValueError(f"PagedAdamW updates parameters on {' and '.join(DEVICE_TYPES)}, these are on {device}")
    return device

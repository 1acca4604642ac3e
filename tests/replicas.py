"""Replicas of a model as nn.DataParallel makes them, on one device."""

from typing import Any

from torch import nn


def replica_of(network: nn.Module) -> Any:
    """As torch.nn.parallel.replicate: the parameters are tensors that depend on the originals."""
    modules = list(network.modules())
    copies: list[Any] = [module._replicate_for_data_parallel() for module in modules]
    of = dict(zip(modules, copies, strict=True))
    for module, copied in of.items():
        copied._modules.update({key: None if part is None else of[part] for key, part in module._modules.items()})
        for key, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[key] = None
            else:
                setattr(copied, key, parameter * 1)
    return copies[0]

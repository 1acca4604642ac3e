"""Adapters without memory (`low_cpu_mem_usage`): their tensors lie on torch's meta device until values are loaded.

Running such an adapter, or saving it, ends in torch's error about tensors on the device meta.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minipeft.attach import adapter_modules
from minipeft.dispatched import follow_class, keep_in_memory
from minipeft.mixins import own_attributes
from minipeft.shards import is_sharded, own_part, part_of


def take_memory(model: nn.Module, adapter: str) -> None:
    """Put the parameters of `adapter` on the meta device, each of the same shape, dtype and name."""
    for _, module in adapter_modules(model):
        for tensor in module.adapter_state(adapter).values():
            # Tied modules have the same parameter.
            if isinstance(tensor, nn.Parameter) and not hasattr(tensor, "_in_memory_on"):
                empty = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
                empty._in_memory_on = tensor.device  # type: ignore[attr-defined]
                torch.utils.swap_tensors(tensor, empty)


def take_values(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into a parameter, in place, under no_grad; of a shard, this process's part of the whole values.

    A parameter that lies on the meta device gets its memory back: where it lay before it was put there, or else (a copy
    of such a model) where `values` lie.
    """
    if tensor.is_meta:
        real = torch.empty_like(tensor, device=getattr(tensor, "_in_memory_on", values.device))
        torch.utils.swap_tensors(tensor, nn.Parameter(real, requires_grad=tensor.requires_grad))
    if is_sharded(tensor):
        tensor, values = own_part(tensor), part_of(values, tensor)
    tensor.copy_(values)


def recall_adapters(model: nn.Module) -> None:
    """If accelerate dispatched `model` after adapters were attached, bring their tensors back from where it put them.

    An offloaded tensor is there for calls of the module that holds it alone, and adapters read theirs without.
    """
    hook = vars(model).get("_hf_hook")
    if hook is None or getattr(hook, "_adapters_recalled", False):
        return
    for _, module in adapter_modules(model):
        for name in own_attributes(module):
            part = module._modules.get(name)
            if part is not None:
                keep_in_memory(part)
        follow_class(module)
    hook._adapters_recalled = True

"""Packed layers and experts whose codes and scales accelerate offloads give what they give in memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_experts import experts_classes, routed, tiny_experts
from torch import Tensor, nn

from minipeft.nf4.experts import expert_parameters, pack_weights, start_packing
from minipeft.nf4.linear import NF4Linear


class Block(nn.Module):
    """A part of a model: what is offloaded is called by name."""

    def __init__(self, experts: nn.Module, double: bool) -> None:
        super().__init__()
        self.experts = experts
        self.linear = NF4Linear.from_linear(nn.Linear(64, 64), double_quant=double)

    def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.nn.functional.pad(self.experts(x, *routing), (0, 64 - x.shape[1])))
        return out


def block(double: bool) -> Block:
    experts: Any = start_packing(tiny_experts(experts_classes()["gpt_oss.GptOssExperts"]), None)
    for name in expert_parameters(experts):
        pack_weights(experts, name, 64, double)
    return Block(experts, double)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("place", ["cpu", "disk", "by-the-hook"])
def test_offloaded_scales_are_found(place: str, double: bool, tmp_path: Path) -> None:
    model = block(double)
    given = routed()
    expected = copy.deepcopy(model)(*given)
    if place == "cpu":
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    elif place == "disk":
        disk_offload(model, str(tmp_path), torch.device("cpu"), offload_buffers=True)
    else:  # which keeps the values itself, by the names of the buffers
        for part in (model.linear, model.experts):
            add_hook_to_module(part, AlignDevicesHook("cpu", offload=True, offload_buffers=True))
    assert model.linear.weight.is_meta and model.linear.absmax.is_meta and model.linear.quant_map.is_meta
    assert all(tensor.is_meta for name, tensor in model.experts.named_buffers() if "absmax" in name)
    for _ in range(2):
        assert torch.equal(model(*given), expected)
        assert model.linear.absmax.is_meta

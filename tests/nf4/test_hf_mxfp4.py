"""gpt-oss in MXFP4 goes into NF4 while it loads: its numbers are those of the format, decoded here by definition."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import edit_tensors, saved
from safetensors.torch import load_file, save_file
from test_hf_experts import MIXTURES, assert_same, load, stacked, weights_of_experts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

from minipeft.nf4.hf import NF4Config, quantize_model
from minipeft.train.models import load_base_model

# E2M1: a sign, two bits of exponent and one of mantissa.
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """(experts, out, groups, 16 bytes) and scales -> (experts, in, out): 32 numbers a group, low half first."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    values = torch.where(codes < 8, VALUES[codes % 8], -VALUES[codes % 8])
    return (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)


def checkpoint(folder: Path) -> Any:
    """A gpt-oss in MXFP4, as on the hub; returns the dense model that it stands for."""
    dense = MIXTURES["gpt_oss"].build()
    saved(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights_of_experts(dense).items():
        experts, columns, rows = weight.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weight.data.copy_(decode(blocks, scales))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return dense


def without_mxfp4(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config


def test_the_experts_are_those_of_the_decoded_model(tmp_path: Path) -> None:
    dense = checkpoint(tmp_path / "mxfp4")
    wanted = quantize_model(dense)
    config = without_mxfp4(tmp_path / "mxfp4")
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tmp_path / "mxfp4", config=config, quantization_config=NF4Config(), dtype=dtype)
        assert len(stacked(model)) == 2 and not weights_of_experts(model)
        if dtype == torch.float32:
            assert_same(model, wanted)
        for name, module in stacked(model).items():
            # Numbers of four bits are the same in 16.
            for weight in ("gate_up_proj", "down_proj"):
                assert torch.equal(module.get_parameter(weight), wanted.get_submodule(name).get_parameter(weight))
    again = load(saved(model, tmp_path / "again"))
    assert_same(again, model)
    assert_same(load_base_model(tmp_path / "mxfp4", quantize="nf4", dtype="float32", device="cpu"), wanted)


def test_experts_may_stay_dense(tmp_path: Path) -> None:
    dense = checkpoint(tmp_path / "mxfp4")
    config = without_mxfp4(tmp_path / "mxfp4")
    model = load(tmp_path / "mxfp4", config=config, quantization_config=NF4Config(experts=False))
    for name, weight in weights_of_experts(dense).items():
        assert torch.equal(model.get_parameter(name), weight)
    assert_same(load(saved(model, tmp_path / "again")), model)


def test_transformers_own_dequantization_gives_the_same_through_memory(tmp_path: Path) -> None:
    wanted = quantize_model(checkpoint(tmp_path))
    options = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    assert_same(quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path, **options)), wanted)


def test_a_half_of_a_stack_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj_scales"))
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.experts.down_proj: the checkpoint has MXFP4 blocks of it alone"
    ):
        load(tmp_path, config=without_mxfp4(tmp_path), quantization_config=NF4Config())

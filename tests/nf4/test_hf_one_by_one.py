"""4-bit checkpoints that hold experts one by one, quantized by bitsandbytes itself, load into stacks as they are."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hf_helpers import edit_config, edit_tensors, logits, saved
from safetensors.torch import load_file, save_file
from test_hf_experts import MIXTURES, assert_same, load, stacked, weights_of_experts
from test_nf4 import decoded_by_bitsandbytes
from torch import Tensor

from minipeft.compat import changes_conversions
from minipeft.nf4 import NF4Weight
from minipeft.nf4.hf import NF4HfQuantizer

pytestmark = pytest.mark.skipif(
    not changes_conversions(NF4HfQuantizer.__mro__[1]), reason="transformers 5.6 has no place for these conversions"
)
FAMILIES = ["Mixtral", "Qwen3-MoE", "qwen2_moe", "phimoe", "nemotron_h", "gpt_oss"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def packed_by_bitsandbytes(name: str, weight: Tensor, nested: bool, kind: str = "nf4") -> dict[str, Tensor]:
    codes, state = bnb.quantize_4bit(weight.contiguous(), quant_type=kind, compress_statistics=nested)
    return {name: codes, **{f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}


def as_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """gpt-oss as unsloth writes it: a layer for each expert, and a router with a layer inside."""
    found = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if "experts" not in name:
            found[name.replace(".router.", ".router.linear.")] = tensor
            continue
        for e, one in enumerate(tensor):
            end = f"{leaf.removesuffix('_bias')}s.{e}." + ("bias" if leaf.endswith("_bias") else "weight")
            found[f"{path}.{end}"] = one if leaf.endswith("_bias") else one.T.contiguous()
    return found


def checkpoint(
    folder: Path, family: str, nested: bool = True, pack: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """A checkpoint of bitsandbytes' with packed experts and attention; returns the dense experts that it stands for."""
    dense = MIXTURES[family].build()
    saved(dense, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = as_layers(tensors) if family == "gpt_oss" else tensors
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        expert = ".experts." in name and name.endswith("weight")
        attention = any(f".{p}_proj.weight" in name for p in "qkvo")
        if (expert and pack(name)) or attention:
            stored |= packed_by_bitsandbytes(name, tensor, nested)
        else:
            stored[name] = tensor
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    linear = [name for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear)]
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "float32",
        "llm_int8_skip_modules": sorted({n.split(".")[-1] for n in linear} - {f"{p}_proj" for p in "qkvo"}),
    }
    (folder / "config.json").write_text(json.dumps(config))

    def decoded(expert: Tensor) -> Tensor:
        codes, state = bnb.quantize_4bit(expert.contiguous(), quant_type="nf4", compress_statistics=nested)
        return decoded_by_bitsandbytes(codes, state)

    found = {}
    for name, weight in weights_of_experts(dense).items():
        transposed = dense.get_submodule(name.rpartition(".")[0]).is_transposed
        parts = 2 if name.endswith("gate_up_proj") and family != "gpt_oss" else 1
        matrices = []
        for expert in weight.detach():
            expert = expert.T if transposed else expert
            matrix = torch.cat([decoded(part) for part in expert.chunk(parts)])
            matrices.append(matrix.T if transposed else matrix)
        found[name] = torch.stack(matrices)
    return found


@every_family
@pytest.mark.parametrize("nested", [True, False])
def test_values_are_those_of_the_file_and_nothing_is_quantized_again(
    family: str, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = checkpoint(tmp_path / "stored", family, nested)
    monkeypatch.setattr(NF4Weight, "quantize", None)
    model = load(tmp_path / "stored")
    assert not weights_of_experts(model)
    modules = stacked(model)
    for name, dense in wanted.items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(modules[path].dense_experts(leaf), dense), name
        # A parameter of one layer keeps its double quantization.
        two = leaf == "gate_up_proj" and family != "gpt_oss"
        assert modules[path].stack(leaf).double_quant == (nested and not two)
    plain = MIXTURES[family].build()
    for name, parameter in plain.named_parameters():
        if name in wanted:
            parameter.data.copy_(wanted[name])
        elif parameter.shape != model.get_parameter(name).shape:
            parameter.data.copy_(model.get_submodule(name.rpartition(".")[0]).dequantize())
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    # From then on it is saved as stacks, under the names that transformers has now.
    again = load(saved(model, tmp_path / "again"))
    assert_same(again, model)
    kept = load_file(tmp_path / "again" / "model.safetensors")
    assert not [name for name in kept if re.search(r"experts\.(\w+\.)?\d+\.|router\.linear", name)]


def test_single_experts_of_other_layers_may_be_dense(tmp_path: Path) -> None:
    for family in ("Qwen3-MoE", "gpt_oss"):
        folder = tmp_path / family
        wanted = checkpoint(folder, family, pack=lambda name: ".layers.1." in name)
        model = load(folder)
        left = weights_of_experts(model)
        assert set(left) == {name for name in wanted if ".layers.0." in name} and len(left) == 2
        plain = MIXTURES[family].build()
        assert all(torch.equal(weight, plain.get_parameter(name)) for name, weight in left.items())


FIRST, GATE_UP = "model.layers.0.mlp.experts", ("gate_proj", "up_proj")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: drop(s, f"{FIRST}.2.up_proj.weight"), r"3 tensors .*up_proj.weight.* for 4 experts"),
        (lambda s: s.pop(f"{FIRST}.2.up_proj.weight.absmax"), r"3 tensors .*up_proj.weight.absmax for 4 experts"),
        (
            lambda s: drop(s, *(f"{FIRST}.{e}.up_proj.weight" for e in range(4))),
            r"the checkpoint lacks .*up_proj.weight",
        ),
        (lambda s: unpack(s, f"{FIRST}.2.down_proj.weight"), r"3 tensors .*absmax for 4 experts"),
        (lambda s: repack(s, f"{FIRST}.2.down_proj.weight", 32, 64), r"expert 2 is \(32, 64\).* expects \(64, 32\)"),
        (lambda s: repack(s, f"{FIRST}.2.down_proj.weight", 64, 32, "fp4"), "packed as fp4"),
        (
            lambda s: [repack(s, f"{FIRST}.{e}.{n}_proj.weight", 3, 7) for e in range(4) for n in ("gate", "up")],
            "not full",
        ),
    ],
)
def test_what_cannot_be_stacked_is_named(edit: Any, message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, "Qwen3-MoE")
    edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=rf"\n  {FIRST}.\w+_proj: .*{message}"):
        load(tmp_path)


def drop(tensors: dict[str, Tensor], *names: str) -> None:
    for key in [key for key in tensors if any(key == name or key.startswith(f"{name}.") for name in names)]:
        del tensors[key]


def unpack(tensors: dict[str, Tensor], name: str) -> None:
    drop(tensors, name)
    tensors[name] = torch.randn(64, 32)


def repack(tensors: dict[str, Tensor], name: str, rows: int, columns: int, kind: str = "nf4") -> None:
    drop(tensors, name)
    tensors |= packed_by_bitsandbytes(name, torch.randn(rows, columns), True, kind)


def test_a_config_that_says_the_experts_are_dense_is_answered(tmp_path: Path) -> None:
    checkpoint(tmp_path, "Mixtral")
    edit_config(tmp_path, experts=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj is packed in the checkpoint, but .* leaves"):
        load(tmp_path)

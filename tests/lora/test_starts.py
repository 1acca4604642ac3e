"""The start values of A and B: PEFT's, number by number, for the same seed."""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import minipeft


class Layers(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 10, bias=False)
        self.conv1d, self.conv, self.emb = Conv1D(7, 6), nn.Conv2d(4, 6, 3), nn.Embedding(11, 6)


def started(library: Any, **config: Any) -> Any:
    model = Layers()
    torch.manual_seed(3)
    chosen = {"target_modules": ["first", "second", "conv1d", "emb"], "r": 4, **config}
    return library.get_peft_model(model, library.LoraConfig(**chosen))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name.removeprefix("base_model.model."): p for name, p in named if "lora_" in name}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"target_modules": ["conv", "first"]}])
@pytest.mark.parametrize("kind", [True, False, "gaussian", "orthogonal"])
def test_a_seed_gives_peft_s_adapter(kind: Any, more: dict[str, Any]) -> None:
    if kind == "orthogonal":
        # Not for convolutions.
        more = {name: value for name, value in more.items() if name != "target_modules"}
    theirs, ours = (tensors(started(library, init_lora_weights=kind, **more)) for library in (peft, minipeft))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_seed_gives_the_same_start_in_every_dtype(dtype: torch.dtype) -> None:
    def weight(dtype: torch.dtype) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(6, 8, dtype=dtype))
        torch.manual_seed(0)
        config = minipeft.LoraConfig(target_modules=["0"])
        lora_A: torch.Tensor = minipeft.get_peft_model(model, config)[0].lora_A["default"].weight
        return lora_A.float()

    assert torch.equal(weight(dtype), weight(torch.float32))


def test_orthogonal_factors_have_no_product() -> None:
    model = started(minipeft, init_lora_weights="orthogonal", target_modules=["first"])
    lora_A, lora_B = model.first.factors("default")
    assert lora_A.abs().min() > 0 and lora_B.abs().min() > 0 and (lora_B @ lora_A).abs().max() < 1e-6
    with pytest.raises(ValueError, match="requires the LoRA rank to be even, got 3 instead"):
        started(minipeft, init_lora_weights="orthogonal", rank_pattern={"first": 3})


def test_olora_is_peft_s_and_leaves_the_base_alone(tmp_path: Any) -> None:
    config = {"init_lora_weights": "olora", "target_modules": ["first", "second"], "lora_alpha": 6}
    theirs, ours, plain = started(peft, **config), started(minipeft, **config), Layers()
    x = torch.randn(3, 6)
    for model in (theirs, ours):
        with torch.no_grad():
            model.first.lora_B["default"].weight += 0.1
    assert torch.equal(ours.first.weight, plain.first.weight)
    assert not torch.equal(theirs.base_model.model.first.base_layer.weight, plain.first.weight)
    torch.testing.assert_close(ours.first(x), theirs.base_model.model.first(x))
    theirs.save_pretrained(tmp_path)
    loaded = minipeft.PeftModel.from_pretrained(Layers(), tmp_path)
    torch.testing.assert_close(loaded.first(x), theirs.base_model.model.first(x))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("pattern", [{"rank_pattern": {"lin": 2}}, {"alpha_pattern": {"lin": 3}}])
def test_a_start_converts_exactly_under_rslora_with_patterns(start: str, pattern: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(lin=nn.Linear(8, 8), out=nn.Linear(8, 8)))
    config = minipeft.LoraConfig(
        target_modules=["lin", "out"], r=4, use_rslora=True, init_lora_weights=start, **pattern
    )
    model = minipeft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) / 10
    x = torch.randn(4, 8)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)

"""Stored adapters are judged by their tensors; new ones by their names; bases of 8 bits and rows of zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_llama
from torch import nn

from minipeft import LoraConfig, PeftModel, get_peft_model

IDS = torch.arange(8)[None]


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": ["q_proj", "c_attn", "query_key_value"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "wte"]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "modules_to_save": [], "exclude_modules": []},
    ],
)
def test_a_file_whose_tensors_fit_loads_whatever_else_its_config_names(more: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, init_lora_weights=False, **more)).eval()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "fields",
    [
        *({name: None} for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "loftq_config")),
        *({name: None} for name in ("init_lora_weights", "rank_pattern", "alpha_pattern", "layers_pattern")),
        *({name: []} for name in ("trainable_token_indices", "target_parameters", "layers_to_transform")),
        *({name: {"rho": 2.0}} for name in ("eva_config", "corda_config", "lora_ga_config")),
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
        {"init_lora_weights": "eva"},
        {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        {"target_modules": ["q_proj", "nowhere"], "target_parameters": ["experts.nothing"]},
        {"rank_pattern": {"nothing": 4}, "alpha_pattern": {"nothing": 4}, "ensure_weight_tying": True},
    ],
)
def test_fields_that_ask_for_nothing_once_there_are_tensors_pass(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs.eval()(IDS).logits)
    ours.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")(IDS).logits, ours(IDS).logits
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0, 1], "layers_pattern": []},
        {"modules_to_save": ["nothing"], "ensure_weight_tying": True},
        {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"k_proj": 64}},
        {"r": 64, "lora_alpha": 128, "rank_pattern": {".*q_proj": 2}, "alpha_pattern": {"q_proj": 8}},
    ],
)
def test_values_go_into_an_adapter_that_is_there_if_they_act_alike_in_it(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    ours = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    ours.load_adapter(tmp_path, "default")
    torch.testing.assert_close(ours.eval()(IDS).logits, theirs.eval()(IDS).logits)
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": {"layers.1.*q_proj": 9}}))
    with pytest.raises(
        ValueError, match=r"does not fit the adapter .default. that is there: (lora_alpha|alpha_pattern|r)"
    ):
        ours.load_adapter(tmp_path, "default")


def test_rows_of_modules_that_are_not_there_are_errors_of_new_adapters_alone(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        tiny_llama(), peft.TrainableTokensConfig(token_indices=[1, 2], init_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["embed_tokens", "wte"]}))
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    with pytest.raises(
        ValueError, match=r"'wte'. not found in the base model.*trainable_token_indices: 'wte' matches no"
    ):
        rows = {"embed_tokens": [1], "wte": [1]}
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))


def test_a_start_from_data_is_no_start_of_a_new_adapter() -> None:
    with pytest.raises(ValueError, match=r"'eva' starts from the principal components of data"):
        get_peft_model(tiny_llama(), LoraConfig(init_lora_weights="eva", eva_config={"rho": 1.0}))
    with pytest.warns(UserWarning, match="'eva' but `eva_config` is not specified"):
        LoraConfig(init_lora_weights="eva")
    with pytest.warns(UserWarning, match="`eva_config` specified but will be ignored when"):
        LoraConfig(eva_config={"rho": 2.0})


def test_a_place_without_a_tensor_is_an_error(tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj", "wte"]}))
    with pytest.raises(ValueError, match="missing tensors"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("names", [{"target_modules": ["q_proj", "wte"]}, {"modules_to_save": ["wte"]}])
def test_a_new_adapters_names_all_match(names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'wte' matches no module"):
        get_peft_model(tiny_llama(), LoraConfig(**{"target_modules": ["q_proj"], **names}))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_layer_of_eight_bits_is_refused_by_name(targets: Any, dtype: torch.dtype) -> None:
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj' is a torch.nn.modules.linear.Linear with an 8-bit weight"):
        get_peft_model(model, LoraConfig(target_modules=targets))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_dora_on_a_row_of_zeros_is_finite(kind: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6) if kind is nn.Linear else nn.Conv1d(8, 6, 3)
    with torch.no_grad():
        layer.weight[2] = 0
    x = torch.randn(3, 8) if kind is nn.Linear else torch.randn(3, 8, 5)
    want = layer(x).detach()
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, use_dora=True))
    out = model(x)
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(model.merge_and_unload()(x), want)

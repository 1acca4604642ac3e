"""Adapters that go where a state dict says, and adapters without memory: beside PEFT's own."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_llama
from torch import nn

from minipeft import (
    LoraConfig,
    PeftWarning,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

IDS = torch.tensor([[1, 5, 7, 2]])
SOME = "model.layers.0.self_attn.q_proj|model.layers.1.mlp.up_proj"


def state_of(model: Any, **fields: Any) -> dict[str, torch.Tensor]:
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(model))
    return peft.get_peft_model_state_dict(adapted)


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("low", [False, True])
def test_a_state_dict_says_where_the_adapter_goes(prefix: str, low: bool) -> None:
    model = tiny_llama()
    state = {prefix + name: torch.randn_like(t) for name, t in state_of(model, target_modules=SOME, r=4).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_adapter_in_model(LoraConfig(target_modules=SOME, r=4), model, state_dict=state, low_cpu_mem_usage=low)
    assert adapted_names(model) == set(SOME.split("|"))
    assert {p.is_meta for n, p in model.named_parameters() if "lora_" in n} == {low}
    plain = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(model, plain, low_cpu_mem_usage=low)
    assert not any(parameter.is_meta for parameter in model.parameters())
    held = get_peft_model_state_dict(model)
    assert held.keys() == plain.keys()
    assert all(torch.equal(held[name], plain[name]) for name in plain)


@pytest.mark.parametrize("targets", [["q_proj"], [f"layers.{i}.self_attn.q_proj" for i in (0,)], SOME + "|lm_head"])
def test_modules_that_only_one_of_state_and_config_names_are_told_as_by_peft(targets: Any) -> None:
    model = tiny_llama()
    state = state_of(model, target_modules=SOME)
    told = []
    for function, config in ((inject_adapter_in_model, LoraConfig), (peft.inject_adapter_in_model, peft.LoraConfig)):
        adapted = copy.deepcopy(model)
        with pytest.warns(RuntimeWarning, match="an inconsistency was discovered") as caught:
            function(config(target_modules=targets), adapted, state_dict=state)
        assert adapted_names(adapted) == set(SOME.split("|"))
        told.append(re.findall(r"The (?:PEFT config|state_dict) contained these[^\]]*\]", str(caught[-1].message)))
    assert told[0] == told[1] and told[0]


def test_settings_of_the_config_hold_for_the_modules_of_the_state() -> None:
    model = tiny_llama()
    config = LoraConfig(target_modules=SOME, r=4, rank_pattern={"up_proj": 2}, exclude_modules=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, state_dict=state_of(model, target_modules=SOME, r=4))
    assert model.model.layers[1].mlp.up_proj.r == {"default": 2}
    assert config.target_modules == SOME  # the caller's config is left alone


@pytest.mark.parametrize(
    ("config", "state", "problem"),
    [
        (LoraConfig(target_parameters=["q_proj.weight"]), {}, "config uses `target_parameters`"),
        (LoraConfig(target_modules=["q_proj"]), {"other.lora_A.weight": torch.zeros(8, 2)}, "names no module of Llama"),
        (LoraConfig(target_modules=["q_proj"]), {}, "names no module"),
        (PrefixTuningConfig(num_virtual_tokens=2), {}, "do not go to modules that tensors name"),
    ],
)
def test_states_that_say_nothing_are_refused(config: Any, state: dict[str, torch.Tensor], problem: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=problem):
        inject_adapter_in_model(config, model, state_dict=state)
    assert not adapted_names(model)


CONFIGS = [
    LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=False, bias="all"),
    LoraConfig(target_modules=["q_proj"], use_dora=True, trainable_token_indices=[1, 5]),
    PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_an_adapter_without_memory_is_filled_by_loading(config: Any, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    full = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    for name, parameter in full.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 10
        assert not parameter.is_meta, name
    full.save_pretrained(tmp_path, save_embedding_layers=False)
    empty = get_peft_model(copy.deepcopy(model), copy.deepcopy(config), low_cpu_mem_usage=True)
    trained = {name for name, parameter in full.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in empty.named_parameters() if parameter.is_meta} == trained
    assert {name for name, parameter in empty.named_parameters() if parameter.requires_grad} == trained
    with pytest.raises(NotImplementedError, match="meta"):
        empty.save_pretrained(tmp_path / "empty")
    optimizer = torch.optim.SGD([p for p in empty.parameters() if p.requires_grad], lr=0.1)
    state = get_peft_model_state_dict(full, save_embedding_layers=False)
    with pytest.raises(ValueError, match="does not fit"):
        set_peft_model_state_dict(empty, {"base_model.model.x": torch.zeros(1)}, low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in empty.parameters())
    set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in empty.parameters())
    assert torch.equal(empty.eval()(IDS).logits, full.eval()(IDS).logits)
    # The parameters stayed the objects that the optimizer holds.
    before = empty(IDS).logits.detach()
    empty(IDS).logits.sum().backward()
    optimizer.step()
    assert not torch.equal(empty(IDS).logits, before)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_embeddings_that_are_stored_besides_are_told_as_by_peft(targets: list[str], tmp_path: Path) -> None:
    told = []
    for get, config in ((get_peft_model, LoraConfig), (peft.get_peft_model, peft.LoraConfig)):
        model = get(tiny_llama(), config(target_modules=targets))
        for wanted in ("auto", True, False):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model.save_pretrained(tmp_path, save_embedding_layers=wanted)
            told.append(["`save_embedding_layers` to `True` as embedding" in str(one.message) for one in caught])
    assert told[:3] == told[3:] == [[True] if "embed_tokens" in targets else [], [], []]


@pytest.mark.parametrize("flat", [torch.zeros(64), torch.zeros(0)])
def test_shards_in_the_place_of_a_matrix_are_told_when_they_are_saved(flat: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "whole", save_embedding_layers=False)
    model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data = flat
    with pytest.warns(PeftWarning, match="DeepSpeed ZeRO-3 / FSDP shards"):
        model.save_pretrained(tmp_path / "flat", save_embedding_layers=False)
    assert (tmp_path / "flat" / "adapter_config.json").exists()


def test_a_string_is_no_list_of_parameters() -> None:
    for config in (LoraConfig, peft.LoraConfig):
        with pytest.raises(TypeError, match="`target_parameters` must be a list of strings or None"):
            config(target_parameters="linear.weight")


def test_a_second_adapter_without_memory_stands_beside_the_first(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    before = model(IDS).logits
    model.save_pretrained(tmp_path)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    assert torch.equal(model(IDS).logits, before)
    copied = copy.deepcopy(model)
    for one in (model, copied):
        one.load_adapter(tmp_path, "other")
        one.set_adapter("other")
        assert torch.equal(one(IDS).logits, before)
        assert not any(parameter.is_meta for parameter in one.parameters())

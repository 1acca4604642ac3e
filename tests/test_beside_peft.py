"""Where PEFT is installed, its users' tools take our models and configs for PEFT's; nothing imports it for that."""

import copy
import dataclasses
import pickle
import sys
from typing import Any

import peft
import pytest
import torch
from processes import run_process
from tiny import randomize, some_ids, tiny_llama
from torch import nn

import minipeft
from minipeft import BottleneckConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})


def adapted(**changes: Any) -> Any:
    model = minipeft.get_peft_model(tiny_llama(), lora(**changes))
    randomize(model)
    return model


def test_a_model_is_an_instance_of_pefts_classes_while_it_has_adapters() -> None:
    plain = type(tiny_llama())
    model = adapted()
    assert isinstance(model, (peft.PeftModel,)) and isinstance(model, peft.PeftModelForCausalLM)
    assert not isinstance(model, peft.PeftModelForSeq2SeqLM | peft.PeftMixedModel | nn.Linear)
    assert isinstance(model, plain | minipeft.PeftModelForCausalLM)
    assert (type(model).__name__, model.__class__.__name__) == (plain.__name__, plain.__name__)
    assert repr(model).startswith(plain.__name__)
    assert not hasattr(model, "get_prompt_embedding_to_save")  # a method of PEFT's that we do not have
    model.unload()
    assert type(model) is plain and not isinstance(model, peft.PeftModel)


def test_one_without_a_task_is_the_general_model() -> None:
    model = minipeft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    assert isinstance(model, peft.PeftModel) and not isinstance(model, peft.PeftModelForCausalLM)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (LoraConfig(), peft.LoraConfig),
        (PrefixTuningConfig(num_virtual_tokens=3), peft.PrefixTuningConfig),
        (PromptTuningConfig(num_virtual_tokens=3), peft.PromptTuningConfig),
        (TrainableTokensConfig(), peft.TrainableTokensConfig),
        (BottleneckConfig(), peft.PeftConfig),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_config_is_an_instance_of_pefts_config_of_its_method(config: Any, theirs: Any) -> None:
    assert isinstance(config, theirs) and isinstance(config, peft.PeftConfig)
    others = {peft.LoraConfig, peft.PrefixTuningConfig, peft.IA3Config} - {theirs}
    assert not any(isinstance(config, other) for other in others)
    learning = isinstance(config, peft.config.PromptLearningConfig)
    assert learning == config.is_prompt_learning


def test_copies_and_pickles_are_of_the_same_class_and_function() -> None:
    model, ids = adapted(), some_ids()
    assert isinstance(model, peft.PeftModel)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and isinstance(twin, peft.PeftModel)
        assert torch.equal(twin(ids).logits, model(ids).logits)
    config = lora(alpha_pattern={"q_proj": 3})
    twins = [copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)]
    twins += [pickle.loads(pickle.dumps(config, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    assert all(type(twin) is LoraConfig and twin == config for twin in twins)
    twins[1].alpha_pattern["q_proj"] = 4
    assert config.alpha_pattern == {"q_proj": 3}


def test_a_class_made_of_the_models_own_takes_its_place() -> None:
    # As FSDP's second version does.
    model, ids = adapted(), some_ids()
    before, plain = model(ids).logits, type(model)
    seen = model.__class__
    model.__class__ = type(f"FSDP{seen.__name__}", (seen,), {})
    assert isinstance(model, plain) and isinstance(model, peft.PeftModel) and type(model).__name__.startswith("FSDP")
    assert torch.equal(model(ids).logits, before)
    model.__class__ = plain
    assert type(model) is plain
    assert type(model.__class__(model.config)) is plain


def test_pefts_own_call_with_our_config_makes_our_model() -> None:
    for config in (lora(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), lora(task_type=None)):
        model = peft.get_peft_model(tiny_llama(), config, adapter_name="mine")
        assert isinstance(model, minipeft.PeftModel) and model.peft_config == {"mine": config}
    half = peft.get_peft_model(tiny_llama().bfloat16(), lora(), autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert isinstance(peft.get_peft_model(tiny_llama(), lora(), mixed=True), minipeft.PeftModel)
    wrapped = peft.PeftModelForCausalLM(tiny_llama(), lora(), "mine", False)
    assert isinstance(wrapped, minipeft.PeftModel) and list(wrapped.peft_config) == ["mine"]


def test_pefts_own_models_are_as_they_were() -> None:
    isinstance(adapted(), peft.PeftModel)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert type(theirs) is peft.PeftModelForCausalLM and not isinstance(theirs, minipeft.PeftModel)
    ids = some_ids()
    for twin in (copy.deepcopy(theirs), pickle.loads(pickle.dumps(theirs))):
        assert type(twin) is type(theirs) and torch.equal(twin(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: peft.get_peft_model(adapted(), peft.LoraConfig(target_modules=["v_proj"])), "call the model's add_ad"),
        (lambda: peft.LoraModel(adapted(), peft.LoraConfig(target_modules=["v_proj"]), "default"), "its unload"),
        (lambda: peft.LoraModel(tiny_llama(), lora(), "default"), "minipeft.get_peft_model"),
        (lambda: peft.LoraModel(tiny_llama(), {"default": lora()}, "default"), "minipeft.get_peft_model"),
        (lambda: peft.inject_adapter_in_model(lora(), tiny_llama()), "minipeft.inject_adapter_in_model"),
        (lambda: tiny_llama().add_adapter(lora()), "minipeft.get_peft_model"),
    ],
)
def test_what_would_mix_the_two_is_refused(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_compiled_model_is_the_same_function() -> None:
    model, ids = adapted(), some_ids()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(ids).logits, model(ids).logits)


LATER = """
import sys, torch, minipeft
config = minipeft.LoraConfig(target_modules=["0"])
model = minipeft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
assert model.__class__ is type(model) and config.__class__ is type(config)
assert not isinstance(model, torch.nn.Linear) and "peft" not in sys.modules
from accelerate.utils import is_peft_model
assert is_peft_model(model) and is_peft_model(torch.nn.DataParallel(model))
import peft
assert isinstance(config, peft.LoraConfig) and not is_peft_model(model.unload())
"""


def test_nothing_imports_peft_and_whoever_imports_it_later_is_answered() -> None:
    run_process([sys.executable, "-c", LATER], check=True)

"""Adapters move between minipeft and PEFT 0.21.2, in both directions, with equal logits."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from transformers import BertConfig, BertForSequenceClassification

import minipeft
from minipeft.attach import adapter_parameters

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias_lora_only": {"bias": "lora_only"},
    "bias_all": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "dora": {"use_dora": True},
    "dora_embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "rslora": {"use_rslora": True},
    "all_linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.layers\.1\..*(q|down)_proj"},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "mlp.up_proj"]},
    "no_task": {"task_type": None},
    "random_start": {"init_lora_weights": False},
}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def arguments(case: str) -> dict[str, Any]:
    common = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return {**common, **CASES[case]}


def base() -> Any:
    return tiny_llama(attention_bias=True)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(some_ids()).logits


def files(directory: Path) -> tuple[dict[str, tuple], dict[str, Any]]:
    """Names, shapes and dtypes of the tensors, and the configuration."""
    with safe_open(directory / "adapter_model.safetensors", "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        shapes = {k: (tuple(tensors.get_tensor(k).shape), tensors.get_tensor(k).dtype) for k in tensors.keys()}  # noqa: SIM118
    config = json.loads((directory / "adapter_config.json").read_text())
    # PEFT writes the names as they lie in its set.
    targets = config["target_modules"]
    return shapes, {**config, "target_modules": sorted(targets) if isinstance(targets, list) else targets}


@pytest.mark.parametrize("case", CASES)
def test_adapter_made_by_peft_gives_the_same_logits_here(case: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**arguments(case)))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = minipeft.PeftModel.from_pretrained(base(), tmp_path)
    assert not torch.allclose(logits(ours), logits(base()), **TOLERANCE)
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_adapter_made_here_gives_the_same_logits_in_peft(case: str, tmp_path: Path) -> None:
    ours = minipeft.get_peft_model(base(), minipeft.LoraConfig(**arguments(case)))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_files_have_the_same_tensors_and_fields(case: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**arguments(case)))
    ours = minipeft.get_peft_model(base(), minipeft.LoraConfig(**arguments(case)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    their_tensors, their_config = files(tmp_path / "theirs")
    our_tensors, our_config = files(tmp_path / "ours")
    assert our_tensors == their_tensors
    # PEFT draws the order of names anew in each run, and writes "all-linear" out its own way.
    for config in (their_config, our_config):
        for field in ("target_modules", "exclude_modules"):
            if isinstance(config[field], list):
                config[field].sort()
    if case in ("all_linear", "exclude"):
        del their_config["target_modules"], our_config["target_modules"]
    assert our_config == their_config


def test_named_adapters_lie_in_subfolders_as_in_peft(tmp_path: Path) -> None:
    config = arguments("plain")
    ours = minipeft.get_peft_model(base(), minipeft.LoraConfig(**config))
    ours.add_adapter("other", minipeft.LoraConfig(**{**config, "r": 2}))
    randomize(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    theirs.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        torch.testing.assert_close(logits(theirs), logits(ours), **TOLERANCE)


def test_gpt2_conv1d_adapter_both_ways(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "r": 4,
        "target_modules": ["c_attn", "mlp.c_proj"],
        "use_dora": True,
        "fan_in_fan_out": True,
    }
    theirs = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**config))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minipeft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(ours), **TOLERANCE)


def test_an_orthogonal_start_of_pefts_is_read_but_none_is_made(tmp_path: Path) -> None:
    config = {**arguments("plain"), "init_lora_weights": "orthogonal"}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**config))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minipeft.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    ours.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("field", ["use_qalora", "alora_invocation_tokens"])
def test_a_file_that_asks_for_what_is_not_here_gets_advice_for_files(field: str, tmp_path: Path) -> None:
    changes = {"use_qalora": True, "alora_invocation_tokens": [5, 6]}
    peft.LoraConfig(**arguments("plain"), **{field: changes[field]}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"made with {field}=.*use it with PEFT, or train one without {field}$"):
        minipeft.PeftConfig.from_pretrained(tmp_path)


def tiny_classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=128, num_labels=3, **sizes)).eval()


def test_all_biases_of_a_classifier_go_both_ways(tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 2, "task_type": "SEQ_CLS", "target_modules": "all-linear", "bias": "all"}
    theirs = peft.get_peft_model(tiny_classifier(), peft.LoraConfig(**config))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert "base_model.model.classifier.modules_to_save.bias" in stored, "PEFT writes it once now"
    ours = minipeft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(ours), **TOLERANCE)


def test_two_values_for_a_classifiers_bias_are_an_error() -> None:
    config = minipeft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", bias="all")
    ours = minipeft.get_peft_model(tiny_classifier(), config)
    state = minipeft.get_peft_model_state_dict(ours)
    again = "base_model.model.classifier.modules_to_save.bias"
    minipeft.set_peft_model_state_dict(ours, {**state, again: state["base_model.model.classifier.bias"].clone()})
    with pytest.raises(ValueError, match=f"unknown tensors {again}"):
        minipeft.set_peft_model_state_dict(ours, {**state, again: torch.ones(3)})


@pytest.mark.parametrize("kind", ["lora_only", "all"])
@pytest.mark.parametrize("dora", [False, True])
def test_biases_act_though_the_config_trains_none(kind: str, dora: bool, tmp_path: Path) -> None:
    """A state with biases, over an adapter that has none: PEFT writes them into the base."""
    config = {**arguments("plain"), "use_dora": dora}
    source = minipeft.get_peft_model(base(), minipeft.LoraConfig(**config, bias=kind))
    randomize(source)
    state = minipeft.get_peft_model_state_dict(source)
    assert any(name.endswith("bias") for name in state)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(theirs, state)
    ours = minipeft.get_peft_model(base(), minipeft.LoraConfig(**config))
    plain = logits(base())
    with pytest.raises(ValueError, match=r"unknown tensors base_model\.model\.nope\.bias( \(|$)"):
        minipeft.set_peft_model_state_dict(ours, {**state, "base_model.model.nope.bias": torch.zeros(3)})
    first = next(name for name in state if name.endswith("bias"))
    with pytest.raises(ValueError, match=r"unknown tensors .*bias"):
        minipeft.set_peft_model_state_dict(ours, {name: tensor for name, tensor in state.items() if name != first})
    assert not any("trained_bias" in name for name in ours.state_dict()) and ours.peft_config["default"].bias == "none"
    minipeft.set_peft_model_state_dict(ours, state)
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    torch.testing.assert_close(logits(ours), logits(source), **TOLERANCE)
    assert all(parameter.requires_grad for _, parameter in adapter_parameters(ours))
    with ours.disable_adapter():
        assert torch.equal(logits(ours), plain)
    assert ours.peft_config["default"].bias == kind
    ours.save_pretrained(tmp_path)
    again = minipeft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_resized_vocabulary_travels_with_the_adapter(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")

    def resized(library: Any) -> Any:
        model = type(base()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(140)
        return library.get_peft_model(model, library.LoraConfig(**arguments("plain")))

    theirs, ours = resized(peft), resized(minipeft)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours")[0] == files(tmp_path / "theirs")[0]
    again = type(base()).from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(140)
    loaded = minipeft.PeftModel.from_pretrained(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(theirs), **TOLERANCE)


def test_state_dict_functions_agree_with_peft() -> None:
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**arguments("modules_to_save")))
    ours = minipeft.get_peft_model(base(), minipeft.LoraConfig(**arguments("modules_to_save")))
    randomize(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    assert minipeft.get_peft_model_state_dict(ours).keys() == state.keys()
    minipeft.set_peft_model_state_dict(ours, state)
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)


def test_parameter_names_and_counts_agree_with_peft() -> None:
    config = arguments("dora")
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**config))
    ours = minipeft.get_peft_model(base(), minipeft.LoraConfig(**config))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    their_names = {n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad}
    our_names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert our_names == their_names

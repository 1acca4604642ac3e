"""PEFT's functions about names of targets and tensors, beside PEFT's own."""

import copy
import dataclasses
from typing import Any

import peft
import peft.tuners.tuners_utils as theirs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama
from torch import nn

from minipeft import LoraConfig, LoraModel, TrainableTokensModel, get_peft_model
from minipeft.tuners import tuners_utils as ours
from minipeft.utils.constants import DUMMY_MODEL_CONFIG, MIN_TARGET_MODULES_FOR_OPTIMIZATION

NAMES = st.lists(st.sampled_from(["a", "b", "c", "ab", "0", "1"]), min_size=1, max_size=4).map(".".join)


@given(st.sets(NAMES, min_size=1, max_size=12), st.sets(NAMES, max_size=12))
def test_short_lists_of_targets_are_pefts(targets: set[str], others: set[str]) -> None:
    # Names that the targets select are none of the others, where these functions are used.
    others = {name for name in others if not any(f".{name}".endswith(f".{target}") for target in targets)}
    short = ours._find_minimal_target_modules(targets, others)
    assert all(any(f".{name}".endswith(f".{ending}") for ending in short) for name in targets)
    assert not any(f".{name}".endswith(f".{ending}") for name in others for ending in short)
    assert len(short) <= len(theirs._find_minimal_target_modules(targets, others))


@pytest.mark.parametrize("wrong", ["foo", [], ["", "foo"], ["foo", "bar"]])
def test_short_lists_are_made_of_names_that_are_not_among_the_others(wrong: object) -> None:
    for function in (ours._find_minimal_target_modules, theirs._find_minimal_target_modules):
        with pytest.raises(ValueError, match="target_modules"):
            function(wrong, ["bar"])  # type: ignore[arg-type]


def test_a_long_list_of_targets_is_held_as_pefts_short_one() -> None:
    model = tiny_llama(num_hidden_layers=MIN_TARGET_MODULES_FOR_OPTIMIZATION // 2)
    layers = range(MIN_TARGET_MODULES_FOR_OPTIMIZATION // 2)
    targets = [f"layers.{i}.self_attn.{name}" for i in layers for name in ("q_proj", "v_proj")]
    more = [*targets[1:], "layers.0.mlp.up_proj"]
    for given_targets in (targets, more, [*more, "layers.1.mlp.up_proj"]):
        reference = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=given_targets))
        mine = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=given_targets))
        held = mine.peft_config["default"].target_modules
        assert held == reference.peft_config["default"].target_modules
        adapted = {n.removeprefix("base_model.model.") for n, m in reference.named_modules() if hasattr(m, "lora_A")}
        assert {name for name, module in mine.named_modules() if hasattr(module, "lora_A")} == adapted
    few = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=targets[:3]))
    assert few.peft_config["default"].target_modules == set(targets[:3])


@pytest.mark.parametrize("targets", [["k_proj"], None, ".*(q_proj|v_proj)$", "all-linear"])
def test_all_linear_becomes_names(targets: Any) -> None:
    model = tiny_llama()
    expected = theirs._maybe_include_all_linear_layers(peft.LoraConfig(target_modules=targets), copy.deepcopy(model))
    got = ours._maybe_include_all_linear_layers(LoraConfig(target_modules=targets), model)
    if targets == "all-linear":  # the same modules, by shorter names
        names = [name for name, _ in model.named_modules()]
        assert {name for name in names if name.endswith(tuple(got.target_modules))} == expected.target_modules
    else:
        assert got.target_modules == expected.target_modules
    assert not hasattr(model.model.layers[0].mlp.up_proj, "lora_A")


def test_names_of_the_adapters_tensors_are_pefts_without_its_wrapper() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lin0, self.lin1 = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.head, self.lora_like = nn.Linear(4, 4), nn.Linear(4, 4)

    fields = {"target_modules": ["lin0", "embed"], "modules_to_save": ["head"], "use_dora": True}
    one = get_peft_model(Net(), LoraConfig(**fields))
    two = peft.get_peft_model(Net(), peft.LoraConfig(**fields))
    one.add_adapter("other", LoraConfig(target_modules=["lin0", "lin1"]))
    two.add_adapter("other", peft.LoraConfig(target_modules=["lin0", "lin1"]))
    for adapter in (None, "default", "other"):
        expected = theirs._get_tuner_state_dict_key_prefixes(two, adapter_name=adapter)
        held = theirs._filter_state_dict_by_key_prefixes(two.state_dict(), expected)
        prefixes = ours._get_tuner_state_dict_key_prefixes(one, adapter_name=adapter)
        found = ours._filter_state_dict_by_key_prefixes(one.state_dict(), prefixes)
        assert sorted(found) == sorted(name.removeprefix("base_model.model.") for name in held)


def test_filtering_stops_at_dots() -> None:
    state = {"a": 0, "a.b": 1, "a.b.c": 2, "a.bc": 3, "ab": 4, "x.a.b": 5, "b.c": 6}
    for prefixes in ({"a.b"}, {"a"}, {"a.b", "b.c"}, set()):
        expected = theirs._filter_state_dict_by_key_prefixes(state, prefixes)
        assert ours._filter_state_dict_by_key_prefixes(state, prefixes) == expected


def test_the_config_of_any_model_is_a_dictionary() -> None:
    @dataclasses.dataclass
    class Settings:
        model_type: str = "mine"

    plain, described = nn.Linear(2, 2), nn.Linear(2, 2)
    described.config = Settings()
    for model in (plain, described, tiny_llama()):
        assert ours.BaseTuner.get_model_config(model) == theirs.BaseTuner.get_model_config(model)
    assert ours.BaseTuner.get_model_config(plain) == DUMMY_MODEL_CONFIG


def test_no_method_shares_tensors_between_layers() -> None:
    for one, other in ((LoraModel, peft.LoraModel), (TrainableTokensModel, peft.TrainableTokensModel)):
        assert one.uses_shared_state is other.uses_shared_state is False

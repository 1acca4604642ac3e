"""Which parameters get gradients, adapters merged and adapters made again: as in PEFT, which is the oracle here."""

import copy
import re
import warnings
from typing import Any

import hypothesis
import peft
import pytest
import torch
from hypothesis import strategies as st
from tiny import randomize, some_ids, tiny_llama
from torch import nn

import minipeft
from minipeft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["lin0"]},
    {"target_modules": ["lin0", "lin2"], "r": 2},
    {"target_modules": ["lin2"], "modules_to_save": ["lin1"]},
    {"target_modules": ["lin1"], "inference_mode": True},
]
NAMES = ("default", "b", "c")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = nn.Linear(4, 4)
        self.lin1 = nn.Linear(4, 4)
        self.lin2 = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(self.lin1(self.lin0(x).relu()).relu())


def trained(model: nn.Module) -> set[str]:
    names = (name.replace("base_model.model.", "") for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace("base_layer.", "").replace("original_module.", "") for name in names}


VERBS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(NAMES[1:]), st.integers(0, len(CONFIGS) - 1)),
    st.tuples(st.just("set"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("requires_grad"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("disable"), st.none(), st.none()),
    st.tuples(st.just("merge"), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("unmerge"), st.none(), st.none()),
)


def run(lib: Any, first: int, verbs: list[Any]) -> list[Any]:
    """What is trained, active and merged after each verb."""
    model = lib.get_peft_model(MLP(), lib.LoraConfig(**CONFIGS[first]))
    seen: list[Any] = [trained(model)]
    for verb, name, argument in verbs:
        here = name in model.peft_config
        saved = [adapter for adapter, config in model.peft_config.items() if config.modules_to_save]
        if verb == "add" and not here and not (saved or argument == 2):
            model.add_adapter(name, lib.LoraConfig(**CONFIGS[argument]))
        elif verb == "set" and here:
            model.set_adapter(name, inference_mode=argument)
        elif verb == "requires_grad" and here:
            model.set_requires_grad(name, argument)
        elif verb == "disable":
            with model.disable_adapter():
                seen.append(trained(model))
        elif verb == "merge" and here:
            model.merge_adapter([name])
        elif verb == "unmerge":
            model.unmerge_adapter()
        seen.append((trained(model), model.active_adapters))
    return seen


@hypothesis.given(st.integers(0, 1), st.lists(VERBS, max_size=8))
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_the_same_parameters_are_trained_as_in_peft(first: int, verbs: list[Any]) -> None:
    # After the block of disable_adapter(), PEFT gives the active adapter gradients although it had none before.
    verbs = [verb for verb in verbs if verb[0] != "disable" or not any(v[0] in ("requires_grad", "set") for v in verbs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(minipeft, first, verbs) == run(peft, first, verbs)


@pytest.mark.parametrize("trainable", [False, True])
def test_loaded_adapters_are_trained_as_asked(trainable: bool, tmp_path: Any) -> None:
    get_peft_model(MLP(), LoraConfig(**CONFIGS[1])).save_pretrained(tmp_path)
    seen = []
    for lib in (minipeft, peft):
        model = lib.PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=trainable)
        steps = [(trained(model), model.training)]
        model.load_adapter(tmp_path, "other", is_trainable=not trainable)
        steps.append((trained(model), model.training))
        model.load_adapter(tmp_path, "third")
        steps.append((trained(model), model.training))
        model.set_adapter("third")
        steps.append((trained(model), model.training))
        seen.append(steps)
    assert seen[0] == seen[1]


def test_disabling_keeps_what_was_frozen_frozen(tmp_path: Any) -> None:
    get_peft_model(MLP(), LoraConfig(**CONFIGS[0])).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MLP(), tmp_path)
    for _ in range(2):
        with model.disable_adapter():
            pass
        model.disable_adapter_layers()
        model.disable_adapter_layers()
        model.enable_adapter_layers()
        assert not trained(model)
    model.set_adapter("default")
    before = trained(model)
    model.disable_adapter_layers()
    assert not trained(model) and not model.has_active_enabled_adapter
    model = copy.deepcopy(model)
    model.enable_adapter_layers()
    assert trained(model) == before == {"lin0.lora_A.default.weight", "lin0.lora_B.default.weight"}
    assert model.has_active_enabled_adapter


def test_only_parameters_get_gradients() -> None:
    class WithNorm(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

    model = get_peft_model(WithNorm(), LoraConfig(target_modules=["lin0"], modules_to_save=["norm"]))
    model.set_adapter("default")
    model.set_requires_grad("default", True)
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_injecting_leaves_other_adapters_alone() -> None:
    model = inject_adapter_in_model(LoraConfig(**CONFIGS[0]), MLP())
    before = trained(model)
    inject_adapter_in_model(LoraConfig(**CONFIGS[3]), model, "frozen")
    assert trained(model) == before


def test_adapters_are_merged_one_after_the_other() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("b", LoraConfig(target_modules=["v_proj", "down_proj"]))
    randomize(model)
    base = {name: p.clone() for name, p in model.state_dict().items()}
    model.set_adapter(["default", "b"])
    both = model(some_ids()).logits
    model.set_adapter("default")
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match=r"Already following adapters were merged default\. .* additionally merging b"):
        model.merge_adapter(["b"])
    torch.testing.assert_close(model(some_ids()).logits, both, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter(["default", "b"])
    at_once = copy.deepcopy(model)
    at_once.unmerge_adapter()
    at_once.merge_adapter(["default", "b"])
    assert all(torch.equal(t, at_once.state_dict()[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match=re.escape("Cannot delete adapter(s) ['b'] while they are merged")):
        model.delete_adapter("b")
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging"):
        model.set_adapter("b")
    assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        model.unmerge_adapter()


def test_modules_that_were_set_by_themselves_merge_what_acts_in_them() -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0", "lin1"]))
    model.add_adapter("b", LoraConfig(target_modules=["lin0", "lin1"]))
    randomize(model, scale=0.5)
    x = torch.randn(3, 4)
    model.lin0.set_adapter(["default", "b"])
    model.lin1.set_adapter("b")
    acting = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), acting)
    assert [list(model.get_submodule(name).merged_adapters) for name in ("lin0", "lin1")] == [["default", "b"], ["b"]]
    model.unmerge_adapter()
    assert torch.equal(model(x), acting)


def test_a_merge_that_would_not_be_finite_changes_nothing() -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    model.add_adapter("b", LoraConfig(target_modules=["lin0"]))
    randomize(model)
    model.merge_adapter()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.lin0.lora_A["b"].weight.data[0, 0] = float("inf")
    with (
        pytest.warns(UserWarning, match="additionally"),
        pytest.raises(
            ValueError,
            match=r"NaNs detected in the merged weights\. The adapter default, b seems to be broken: .* lin0 infinite",
        ),
    ):
        model.merge_adapter(["b"], safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    assert torch.equal(model.lin0.weight, before["lin0.weight"])


def test_deleting_another_adapter_keeps_the_merge() -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    model.add_adapter("b", LoraConfig(target_modules=["lin0"]))
    randomize(model)
    model.merge_adapter()
    merged = model.lin0.weight.clone()
    model.delete_adapter("b")
    assert torch.equal(model.lin0.weight, merged) and list(model.peft_config) == ["default"]


# A second get_peft_model


def test_a_cell_that_runs_again_gives_what_it_gave() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), config)
    randomize(model)
    with pytest.warns(UserWarning, match=r"for a second time: of its adapters \['default'\], 'default' is replaced"):
        again = get_peft_model(model, LoraConfig(target_modules=["v_proj"], r=2))
    assert again is model and list(model.peft_config) == model.active_adapters == ["default"]
    fresh = get_peft_model(tiny_llama(), LoraConfig(target_modules=["v_proj"], r=2))
    assert trained(model) == trained(fresh)
    assert torch.equal(model(some_ids()).logits, fresh(some_ids()).logits)
    assert model.targeted_module_names == fresh.targeted_module_names
    assert minipeft.get_peft_model_state_dict(model).keys() == minipeft.get_peft_model_state_dict(fresh).keys()


def test_a_second_adapter_by_another_name_stands_beside_the_first() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    first = model(some_ids()).logits
    with pytest.warns(UserWarning, match="for a second time: of its adapters .*, 'default' does not act any more"):
        get_peft_model(model, LoraConfig(target_modules=["v_proj"]), "other")
    assert model.active_adapters == ["other"] and list(model.peft_config) == ["default", "other"]
    model.set_adapter("default")
    assert torch.equal(model(some_ids()).logits, first)


def test_a_second_config_that_does_not_fit_changes_nothing() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    config = LoraConfig(target_modules=["nope"])
    with pytest.warns(UserWarning, match="second time"), pytest.raises(ValueError, match="nope"):
        get_peft_model(model, config)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_after_unload_there_is_nothing_to_warn_of() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).unload()
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


# The config


def test_the_model_holds_the_config_that_it_was_given(tmp_path: Any) -> None:
    config, other = LoraConfig(target_modules=["lin0"]), LoraConfig(target_modules="all-linear")
    model = get_peft_model(MLP(), config)
    model.add_adapter("other", other)
    assert model.peft_config == {"default": config, "other": other}
    assert model.peft_config["default"] is config and model.peft_config["other"] is other
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode


def test_a_config_that_does_not_fit_is_as_before() -> None:
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head", "nope"])
    fields = copy.deepcopy(vars(config))
    with pytest.raises(ValueError, match="nope"):
        get_peft_model(tiny_llama(), config)
    assert vars(config) == fields


def test_a_revision_that_is_overwritten_is_named() -> None:
    config = LoraConfig(target_modules=["lin0"], revision="v2")
    with pytest.warns(UserWarning, match="already set base model revision to v2, overwriting with revision main"):
        get_peft_model(MLP(), config, revision="main")
    assert config.revision == "main"


# adapter_names in forward


@pytest.mark.parametrize("call", [lambda model: model, lambda model: model.forward])
def test_forward_takes_an_adapter_for_each_row(call: Any) -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0", "lin2"]))
    model.add_adapter("b", LoraConfig(target_modules=["lin1"]))
    randomize(model)
    model.eval()
    x = torch.randn(3, 4)
    mixed = call(model)(x, adapter_names=["b", "__base__", "default"])
    for row, name in enumerate(["b", None, "default"]):
        if name is None:
            with model.disable_adapter():
                expected = model(x)
        else:
            model.set_adapter(name)
            expected = model(x)
        torch.testing.assert_close(mixed[row], expected[row])
    with pytest.raises(ValueError, match="nope"):
        call(model)(x, adapter_names=["nope"] * 3)


def test_the_signature_of_forward_is_the_plain_models() -> None:
    import inspect

    plain = inspect.signature(tiny_llama().forward)
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert inspect.signature(model.forward) == plain
    assert "adapter_names" not in inspect.signature(model.forward).parameters

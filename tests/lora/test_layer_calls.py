"""PEFT's calls on one layer: the same sequence of them does the same to PEFT's layer and to ours."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import some_ids, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import minipeft


class Layers(nn.Module):
    """An embedding, a linear layer, a Conv1D and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.second = Conv1D(7, 8)
        self.head = nn.Linear(7, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.second(torch.relu(self.first(self.emb(ids)))))
        return out


IDS = torch.arange(10).view(2, 5)
TARGETS = ["emb", "first", "second"]


def adapted(library: Any) -> Any:
    """The model with two adapters that are not at their start, equal in both libraries; the layers are in `model`."""
    model = library.get_peft_model(
        Layers().eval(), library.LoraConfig(target_modules=TARGETS, modules_to_save=["head"], r=2)
    )
    config = library.LoraConfig(
        target_modules=["first", "second"], use_rslora=True, lora_alpha=3, modules_to_save=["head"]
    )
    model.add_adapter("other", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("default", "other"):
            for layer in ("emb", "first", "second"):
                for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                    held = getattr(getattr(model.base_model.model, layer), part)
                    if name in held:
                        tensor = held[name].weight if isinstance(held[name], nn.Module) else held[name]
                        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            copied = model.base_model.model.head.modules_to_save[name].weight
            copied.copy_(torch.randn(copied.shape, generator=generator))
    return model


def layer_of(model: Any, name: str) -> Any:
    return getattr(model.base_model.model, name)


CALLS = st.one_of(
    st.tuples(st.sampled_from([*TARGETS, "head"]), st.just("set_adapter"), st.sampled_from(["default", "other"])),
    st.tuples(st.sampled_from(TARGETS), st.just("set_adapter"), st.sampled_from([["default", "other"], []])),
    st.tuples(st.sampled_from([*TARGETS, "head"]), st.just("enable_adapters"), st.booleans()),
    st.tuples(st.sampled_from(TARGETS), st.just("scale_layer"), st.sampled_from([1, 2, 0.5])),
    st.tuples(st.sampled_from(TARGETS), st.just("unscale_layer"), st.sampled_from([None, 2])),
    st.tuples(st.just(""), st.just("set_adapter"), st.sampled_from(["default", "other"])),
    st.tuples(st.just(""), st.sampled_from(["enable_adapter_layers", "disable_adapter_layers"]), st.none()),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(CALLS, min_size=1, max_size=6))
def test_a_sequence_of_calls_does_as_in_peft(calls: list[tuple[str, str, Any]]) -> None:
    models = [adapted(peft), adapted(minipeft)]
    for name, call, argument in calls:
        for model in models:
            verb = getattr(layer_of(model, name) if name else model, call)
            verb() if call.endswith("_layers") else verb(argument)
        theirs, ours = models
        torch.testing.assert_close(ours(IDS), theirs(IDS))
        for layer in ("emb", "first", "second", "head"):
            first, second = layer_of(theirs, layer), layer_of(ours, layer)
            assert second.disable_adapters == first.disable_adapters
            assert second.active_adapters == first.active_adapters
            if layer != "head":
                assert second.scaling == pytest.approx(first.scaling)


def test_the_attributes_are_those_of_peft() -> None:
    theirs, ours = adapted(peft), adapted(minipeft)
    for name in TARGETS:
        first, second = layer_of(theirs, name), layer_of(ours, name)
        for attribute in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "merged"):
            assert getattr(second, attribute) == getattr(first, attribute), attribute
        for attribute in ("adapter_layer_names", "other_param_names"):
            assert set(getattr(second, attribute)) <= set(getattr(first, attribute))
            for part in getattr(second, attribute):
                assert set(getattr(second, part)) == set(getattr(first, part)), part
        assert (second.in_features, second.out_features) == (first.in_features, first.out_features)
        assert second._all_available_adapter_names() == first._all_available_adapter_names()
        assert type(second.get_base_layer()) is type(first.get_base_layer())
        for adapter in second._all_available_adapter_names():
            delta = second.get_delta_weight(adapter)
            torch.testing.assert_close(delta, first.get_delta_weight(adapter))
            assert delta.shape == second.get_base_layer().weight.shape


def test_the_base_layer_is_the_plain_layer_over_the_same_tensors() -> None:
    model, plain = adapted(minipeft), Layers()
    names = [*model.state_dict()]
    layer = model.first
    assert type(layer.base_layer) is nn.Linear and layer.base_layer.weight is layer.weight
    x = torch.randn(2, 6)
    assert torch.equal(layer.base_layer(x), plain.first(x)) and not torch.equal(layer(x), plain.first(x))
    assert [*layer.base_layer.state_dict()] == ["weight", "bias"]
    assert torch.equal(model.head.original_module.weight, plain.head.weight)
    layer.base_layer.weight.requires_grad_(True)
    assert layer.weight.requires_grad
    layer.base_layer.weight = nn.Parameter(torch.zeros(8, 6))
    assert layer.weight.count_nonzero() == 0
    assert [*model.state_dict()] == names
    model.merge_adapter()
    assert layer.base_layer.weight.count_nonzero() > 0


def test_the_model_sets_a_layer_again_that_was_set_by_itself() -> None:
    model = adapted(minipeft)
    both, default = {}, model(IDS)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        both[adapter] = model(IDS)
    model.first.set_adapter("default")
    mixed = model(IDS)
    assert not any(torch.equal(mixed, out) for out in both.values())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), mixed)
        twin.first.enable_adapters(False)
        assert not torch.equal(twin(IDS), mixed) and torch.equal(model(IDS), mixed)
    model.set_adapter("other")
    assert torch.equal(model(IDS), both["other"])
    model.first.set_adapter("default")
    model.set_adapter("default")
    assert torch.equal(model(IDS), default) and model.first.switch is model.second.switch


def test_a_layer_set_by_itself_is_off_while_the_model_is() -> None:
    model = adapted(minipeft)
    base = Layers()(IDS)
    model.first.set_adapter("other")
    model.emb.enable_adapters(False)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others"), model.disable_adapter():
        assert torch.equal(model(IDS), base)
    assert not model.emb.disable_adapters
    assert model.first.active_adapters == ["other"]


def test_deleting_the_adapter_of_a_layer_leaves_it_to_the_models() -> None:
    model = adapted(minipeft)
    model.first.set_adapter("other")
    before = adapted(minipeft)(IDS)
    model.delete_adapter("other")
    assert torch.equal(model(IDS), before) and model.first.active_adapters == ["default"]


def test_a_module_trained_whole_takes_one_adapter_that_it_has() -> None:
    model = adapted(minipeft)
    with pytest.raises(ValueError, match="one can act"):
        model.head.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Adapter nobody not found"):
        model.head.set_adapter("nobody")


@pytest.mark.parametrize("name", TARGETS)
def test_a_layer_is_merged_by_itself(name: str) -> None:
    model = adapted(minipeft)
    before, layer = model(IDS), layer_of(model, name)
    weight = layer.weight
    layer.merge()
    assert layer.merged_adapters == ["default"] and layer.merged and layer.weight is not weight
    torch.testing.assert_close(model(IDS), before)
    if name != "emb":
        layer.lora_B["other"].weight.data.fill_(float("inf"))
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter other"):
            layer.merge(safe_merge=True, adapter_names=["other"])
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(model(IDS), before)
    layer.unmerge()
    assert layer.merged_adapters == [] and layer.weight is weight
    layer.merge(adapter_names=["nobody"])
    assert layer.weight is weight


def test_layers_are_shown_under_peft_s_names() -> None:
    theirs, ours = adapted(peft), adapted(minipeft)
    for name in TARGETS:
        shown = repr(layer_of(ours, name))
        assert shown.split("(")[0] == repr(layer_of(theirs, name)).split("(")[0]
        assert "default" in shown and ("in_features=8, out_features=7" in shown) == (name == "second")


def test_the_model_merges_what_acts_in_each_layer() -> None:
    model = adapted(minipeft)
    model.first.set_adapter(["default", "other"])
    model.second.set_adapter("other")
    before = model(IDS)
    model.merge_adapter()
    assert model.second.merged_adapters == ["other"] and model.emb.merged_adapters == ["default"]
    torch.testing.assert_close(model(IDS), before)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS), before)
    torch.testing.assert_close(model.merge_and_unload()(IDS), before)


@pytest.mark.parametrize("packed", [False, True])
def test_hooks_on_the_factors_run_and_change_nothing_else(packed: bool) -> None:
    """As in PEFT, for whoever makes gradients of each sample by them."""
    model = tiny_llama()
    model = minipeft.quantize_model(model, minipeft.NF4Config()) if packed else model
    config = minipeft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = minipeft.get_peft_model(model, config).train()
    ids = some_ids()

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    plain, seen = run(), []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" in name:
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: seen.append((name, o.shape[-1]))))
    watched = run()
    assert len(seen) == len(handles) == 8
    assert all(width == 4 for name, width in seen if "lora_A" in name)
    for ours, right in zip(watched, plain, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    for ours, right in zip(run(), plain, strict=True):
        assert torch.equal(ours, right)
    assert len(seen) == 8


def test_captum_attributes_as_with_peft() -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")

    def attributions(library: Any) -> list[torch.Tensor]:
        model = adapted(library)
        layer, found = model.base_model.model.first, []
        for module in (layer, layer.lora_A["default"], layer.lora_B["default"]):
            for method in (attr.LayerActivation, attr.LayerGradientXActivation, attr.LayerIntegratedGradients):
                more = {} if method is attr.LayerActivation else {"target": (2, 1)}
                found.append(method(model, module).attribute(IDS, **more))
        return found

    for ours, theirs in zip(attributions(minipeft), attributions(peft), strict=True):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)

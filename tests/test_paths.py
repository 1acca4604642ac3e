"""The paths of PEFT's wrapper lead where a script for PEFT expects, and cost the model nothing."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from tiny import randomize, some_ids, tiny_llama
from tiny_families import FAMILIES, OTHERS, RELATIVES
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

from minipeft import BottleneckConfig, LoraConfig, PrefixTuningConfig, get_peft_model, inject_adapter_in_model

FAMILIES_OF_ALL = {**FAMILIES, **RELATIVES, **OTHERS}
ENDS = ("get_decoder", "get_encoder", "get_input_embeddings", "get_output_embeddings")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(4, 6)
        self.lin1 = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(x).relu())


class Named(nn.Module):
    """A model whose own attributes have the names of the wrapper's."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        self.lin0 = nn.Linear(4, 4)
        setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(x)


def names_in(model: nn.Module) -> list[list[str]]:
    return [
        [name for name, _ in model.named_modules(remove_duplicate=False)],
        [name for name, _ in model.named_parameters(remove_duplicate=False)],
        list(model.state_dict()),
    ]


def ends_of(model: nn.Module) -> list[Any]:
    """What transformers finds from each of its models inside `model`, by position."""
    found = []
    for module in model.modules():
        for end in ENDS if isinstance(module, PreTrainedModel) else ():
            try:
                found.append(id(getattr(module, end)()))
            except NotImplementedError:
                found.append(NotImplementedError)
    return found


def copies_of(model: Any) -> list[Any]:
    return [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("lib", [peft, None])
def test_every_path_of_a_plain_module_leads_to_it(lib: Any) -> None:
    config = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
    model = lib.get_peft_model(MLP(), lib.LoraConfig(**config)) if lib else get_peft_model(MLP(), LoraConfig(**config))
    inner = model.base_model.model
    assert type(inner).__name__ == "MLP" and model.model is inner and model.get_base_model() is inner
    assert model.prefix == model.base_model.prefix == "lora_"
    assert model.targeted_module_names == model.base_model.targeted_module_names == ["lin0"]
    assert model.targeted_parameter_names == []
    assert model.modules_to_save == {"lin1"}
    assert model.peft_type == "LORA"
    assert model.base_model.active_adapters == ["default"] and list(model.base_model.peft_config) == ["default"]
    assert inner.get_submodule("lin0") is model.get_submodule("base_model.model.lin0")
    model.base_model.model.lin1._any_attribute = 3
    assert model.lin1._any_attribute == 3
    inner.lin1 = nn.Linear(6, 4)
    assert model.lin1 is inner.lin1 and model(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize("lib", [peft, None])
def test_the_targets_of_several_adapters_are_listed_once(lib: Any) -> None:
    make, config = (lib.get_peft_model, lib.LoraConfig) if lib else (get_peft_model, LoraConfig)
    model = make(MLP(), config(target_modules=["lin0"]))
    model.add_adapter("other", config(target_modules=["lin0", "lin1"], modules_to_save=None))
    assert model.targeted_module_names == ["lin0", "lin1"]
    assert model.modules_to_save is None
    model.base_model.set_adapter(["other", "default"])
    assert model.base_model.active_adapters == ["other", "default"]


# Some mixtures have a shared expert of layers, which "all-linear" takes, beside experts that are parameters.
@pytest.mark.filterwarnings("ignore:.*but not the routed experts beside it")
@pytest.mark.parametrize("name", sorted(FAMILIES_OF_ALL))
def test_transformers_finds_the_same_parts_of_an_adapted_model(name: str) -> None:
    family = FAMILIES_OF_ALL[name]
    model = family.build()
    children = list(model._modules)
    base, plain, classes = model.base_model, ends_of(model), [type(m) for m in model.modules()]
    own = {attribute: getattr(base, attribute, None) for attribute in ("model", "base_model")}
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert ends_of(model) == plain and model.base_model is base
    assert base.model is (own["model"] if own["model"] is not None else model) and base.base_model is own["base_model"]
    assert [type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel)] == [
        c.__name__ for c in classes if issubclass(c, PreTrainedModel)
    ]
    assert base.prefix == "lora_" and base.active_adapters == ["default"]
    for child in (child for child in children if child != "model"):
        assert getattr(base, child) is getattr(model, child) or child in base._modules
    names = names_in(model)
    for one in copies_of(model):
        assert names_in(one) == names
        assert getattr(one.base_model, "_adapted_model", one) is one
    model.base_model.unload()
    assert [type(m) for m in model.modules()] == classes and "_adapted_model" not in vars(base)


@pytest.mark.parametrize("bare", [False, True])
def test_verbs_at_base_model_act_on_the_model(bare: bool) -> None:
    plain = tiny_llama()
    model = get_peft_model(plain.model if bare else plain, LoraConfig(target_modules=["q_proj", "v_proj"]))
    base = model.base_model
    assert base.model is model and base is plain.model
    base.add_adapter("other", LoraConfig(target_modules=["k_proj"]))
    base.set_adapter("other")
    assert model.active_adapters == ["other"] and base.active_adapter == model.active_adapter
    base.set_requires_grad(["default", "other"])
    randomize(model)
    adapted = model(some_ids())[0]
    base.disable_adapter_layers()
    assert not torch.equal(model(some_ids())[0], adapted)
    base.enable_adapter_layers()
    base.merge_adapter()
    assert torch.allclose(model(some_ids())[0], adapted, atol=1e-5)
    base.unmerge_adapter()
    base.delete_adapter("default")
    assert list(base.peft_config) == ["other"]
    assert base.merge_and_unload() is (plain.model if bare else plain)
    assert not hasattr(base, "prefix") and not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    "value", [3, nn.Linear(4, 4), nn.Parameter(torch.ones(2))], ids=["plain", "module", "parameter"]
)
@pytest.mark.parametrize(
    "name", ["base_model", "model", "prefix", "prompt_encoder", "modules_to_save", "targeted_module_names", "peft_type"]
)
def test_what_a_model_calls_by_such_a_name_itself_stays(name: str, value: Any) -> None:
    model = get_peft_model(Named(name, value), LoraConfig(target_modules=["lin0"]))
    for one in copies_of(model):
        own = getattr(one, name)
        assert type(own).__name__ == type(value).__name__
        one(torch.ones(1, 4))
    assert getattr(model, name) is value
    assert getattr(model.unload(), name) is value


def test_parts_of_the_model_are_found_from_every_step_of_the_path() -> None:
    llama = tiny_llama()
    layers, head = llama.model.layers, llama.lm_head
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    assert model.base_model.model.model.layers is model.model.model.layers is model.model.layers is layers
    assert model.base_model.model.lm_head is model.base_model.lm_head is model.model.lm_head is head
    classifier = get_peft_model(
        LlamaForSequenceClassification(llama.config), LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    assert classifier.base_model.score is classifier.base_model.model.score is classifier.score
    model.resize_token_embeddings(130)
    assert model.get_input_embeddings() is model.model.embed_tokens and len(model.model.embed_tokens.weight) == 130
    assert "embed_tokens" not in model._modules
    assert not hasattr(model.unload(), "layers") and not hasattr(llama.model, "lm_head")


def test_checkpointing_is_prepared_by_pefts_call() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.prepare_model_for_gradient_checkpointing(model)
    assert model.get_input_embeddings()(some_ids()).requires_grad and not model.supports_lora_conversion()


def test_a_child_called_base_model_leads_back() -> None:
    child = MLP()
    model = get_peft_model(Named("base_model", child), LoraConfig(target_modules=["lin0"]))
    assert model.base_model is child and child.model is model and child.prefix == "lora_"
    model.unload()
    assert type(child) is MLP and not hasattr(child, "model")


def test_an_attribute_set_later_stands_before_the_path() -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["lin0"]))
    model.prefix = "mine"
    model.model = child = nn.Linear(2, 2)
    assert model.prefix == "mine" and model.model is child and "model.weight" in model.state_dict()


def test_a_method_without_a_prefix_has_none() -> None:
    model = get_peft_model(tiny_llama(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert not hasattr(model, "prefix") and set(model.prompt_encoder) == {"default"}
    assert model.prompt_encoder["default"].embedding.weight.shape[0] == 3
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert not hasattr(lora, "prompt_encoder")
    assert get_peft_model(tiny_llama(), BottleneckConfig()).prefix == "bottleneck"


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_model_that_is_itself_an_adapted_module_keeps_its_verbs(bias: str) -> None:
    class Biased(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(4))

    plain = Biased()
    inject_adapter_in_model(LoraConfig(target_modules=["lin0"], bias=bias), plain, "injected")
    with pytest.warns(UserWarning, match="for a second time"):
        model = get_peft_model(plain, LoraConfig(target_modules=["lin1"], bias=bias))
    model.add_adapter("other", LoraConfig(target_modules=["lin0"], bias=bias))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert copy.deepcopy(model).active_adapters == ["other"]
    assert type(model.unload()) is Biased


def test_a_plain_model_with_a_part_called_model_is_found_one_step_further_on() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"lin": nn.Linear(3, 3)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model["lin"](x)

    model = get_peft_model(Inner(), LoraConfig(target_modules=["lin"]))
    assert model.model is model._modules["model"]
    assert model.base_model.model is model and model.base_model.model.model["lin"] is model.model["lin"]
    assert model.base_model.peft_config is model.peft_config and model.base_model.prefix == "lora_"
    model.base_model.note = 3
    assert model.note == 3
    x = torch.randn(2, 3)
    assert torch.equal(model.base_model(x), model(x))
    assert copy.deepcopy(model).base_model.model is not model
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and not any(name.startswith("base_model") for name in names)

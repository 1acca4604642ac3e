"""A mixture's experts by the names of layers: what PEFT makes of them, and what it leaves out in silence."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from tiny import randomize, some_ids
from tiny_families import Family
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import minipeft
from minipeft import LoraConfig, get_peft_model
from minipeft.errors import PeftWarning
from minipeft.experts import has_interface, weight_names
from minipeft.lora.old_experts import converted_by_peft
from minipeft.train.methods import attach

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_SHARED: dict[str, Any] = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
_LATENT: dict[str, Any] = {
    **{"kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "num_key_value_heads": 4,
}
_NEXT: dict[str, Any] = {"shared_expert_intermediate_size": 32, "layer_types": ["full_attention"] * 2}
# Families that PEFT converts: with routed experts alone, with shared ones, with layers that have none.
CONVERTED = {
    "mixtral": Family("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": Family("qwen3_moe", {**_EXPERTS, "mlp_only_layers": [0]}),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": Family("deepseek_v3", {**_SHARED, **_LATENT}),
    "glm4_moe": Family("glm4_moe", {**_SHARED, "head_dim": 16}),
    "qwen3_next": Family("qwen3_next", {**_EXPERTS, **_NEXT}),
}
QWEN2 = Family("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 32})
PHIMOE = Family("phimoe", {"num_local_experts": 4})
LAYERS = ["gate_proj", "up_proj", "down_proj"]

every_converted = pytest.mark.parametrize("family", CONVERTED.values(), ids=lambda family: family.model_type)
# PEFT says so of its own pattern, and follows it (the ranks in the file are the pattern's).
false_alarm = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
left_out = pytest.mark.filterwarnings("ignore:target_modules.* (mean|but not) the routed experts:UserWarning")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(some_ids()).logits


def adapted(library: Any, family: Family, targets: Any, **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": targets}
    model = library.get_peft_model(family.build(), library.LoraConfig(**{**fields, **changes}))
    randomize(model, scale=0.2)
    return model


def adapted_parts(model: Any) -> set[str]:
    """What an adapter adapts, without layers' numbers: "self_attn.q_proj", "mlp.experts"."""
    tensors = minipeft.get_peft_model_state_dict(model)
    return {name.partition("layers.")[2].partition(".")[2].partition(".lora_")[0] for name in tensors}


@false_alarm
@left_out
@every_converted
@pytest.mark.parametrize("targets", ["old names", "one old name", "gate", "all-linear", "expression"])
def test_old_names_adapt_what_they_adapt_in_peft(family: Family, targets: str, tmp_path: Path) -> None:
    layers = ["w1", "w2", "w3"] if family.model_type == "mixtral" else LAYERS
    given = {
        "old names": ["q_proj", "v_proj", *layers] if family.model_type != "deepseek_v3" else ["o_proj", *layers],
        "one old name": ["w2" if family.model_type == "mixtral" else "down_proj"],
        "gate": ["o_proj", "gate"],
        "all-linear": "all-linear",
        "expression": rf".*\.(o_proj|{'|'.join(layers)})",
    }[targets]
    theirs, ours = (adapted(library, family, given) for library in (peft, minipeft))
    stored = peft.get_peft_model_state_dict(theirs)
    shapes = {name: tensor.shape for name, tensor in minipeft.get_peft_model_state_dict(ours).items()}
    assert shapes == {name: tensor.shape for name, tensor in stored.items()}
    minipeft.set_peft_model_state_dict(ours, stored)
    assert not torch.allclose(logits(ours), logits(family.build()), atol=1e-3)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(family.build(), tmp_path)
    torch.testing.assert_close(logits(back), logits(ours), rtol=0, atol=1e-5)
    again = minipeft.PeftModel.from_pretrained(family.build(), tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_the_families_are_those_that_peft_converts() -> None:
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING

    alike = _MODEL_TO_CONVERSION_PATTERN
    known = [kind for kind in CONFIG_MAPPING_NAMES if get_checkpoint_conversion_mapping(kind)]
    assert len(known) > 30
    ours = {kind for kind in known if converted_by_peft(SimpleNamespace(config=SimpleNamespace(model_type=kind)))}
    assert ours == {kind for kind in known if alike.get(kind) in _MOE_TARGET_MODULE_MAPPING}


def test_layers_that_are_left_out_are_named_and_a_longer_name_takes_them() -> None:
    family = CONVERTED["glm4_moe"]
    says = r"mean the routed experts of Glm4MoeForCausalLM alone.* 6 layers .*'shared_experts\.(down|up|gate)_proj'"
    with pytest.warns(PeftWarning, match=says):
        model = get_peft_model(family.build(), LoraConfig(target_modules=["q_proj", *LAYERS]))
    experts = {"mlp.experts", "mlp.experts.base_layer"}
    assert adapted_parts(model) == {"self_attn.q_proj", *experts}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = get_peft_model(family.build(), LoraConfig(target_modules=["shared_experts.down_proj"]))
    assert adapted_parts(longer) == {"mlp.shared_experts.down_proj"}
    with pytest.warns(PeftWarning, match="left out"):
        both = get_peft_model(family.build(), LoraConfig(target_modules=[*LAYERS, "shared_experts.down_proj"]))
    assert adapted_parts(both) == {"mlp.shared_experts.down_proj", *experts}


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*layers\.1\..*\.(q_proj|w1|w2|w3)"},
        {"target_modules": r".*layers\.1\..*(q_proj|experts\.\d+\.w\d)"},
        {"target_modules": ["q_proj", "w1", "w2", "w3"], "layers_to_transform": 1},
        {"target_modules": ["w1", "w2", "w3", "q_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["w1", "w2", "w3"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_experts_of_some_layers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(CONVERTED["mixtral"].build(), LoraConfig(r=2, **changes))
    randomize(model)
    tensors = minipeft.get_peft_model_state_dict(model)
    assert all(".layers.1." in name for name in tensors)
    assert tensors["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"].shape == (3 * 4, 64)
    model.save_pretrained(tmp_path)
    again = minipeft.PeftModel.from_pretrained(CONVERTED["mixtral"].build(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("expression", [r"model\.layers\.1\.self_attn\.q_proj", r".*\.v_proj"])
def test_an_expression_without_experts_is_stored_so_that_peft_reads_it_alike(expression: str, tmp_path: Path) -> None:
    family = CONVERTED["qwen3_moe"]
    ours = adapted(minipeft, family, expression, lora_dropout=0.1)
    config = ours.peft_config["default"]
    assert config.target_modules == ({"v_proj"} if "v_proj" in expression else {"model.layers.1.self_attn.q_proj"})
    assert not config.target_parameters and not config.rank_pattern
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(family.build(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    assert peft.get_peft_model_state_dict(theirs).keys() == minipeft.get_peft_model_state_dict(ours).keys()


def test_where_peft_leaves_the_experts_out_they_are_adapted_beside_the_layers() -> None:
    """In transformers 4 these names were those of the shared expert and of the routed ones."""
    config: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", *LAYERS]}
    # What one would have to write for PEFT.
    explicit = {
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {"experts.gate_up_proj": 4},
        "alpha_pattern": {"experts.gate_up_proj": 12},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(QWEN2.build(), peft.LoraConfig(**config, **explicit))
    randomize(theirs, scale=0.2)
    ours = get_peft_model(QWEN2.build(), LoraConfig(**config))
    minipeft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    w = get_peft_model(PHIMOE.build(), LoraConfig(target_modules=["w1", "w2", "w3"]))
    assert adapted_parts(w) == {"mlp.experts", "mlp.experts.base_layer"}


def test_the_shared_expert_alone_is_never_taken_in_silence() -> None:
    llama4 = Family("llama4_text", {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 96})
    for family, given in ((QWEN2, "all-linear"), (llama4, "all-linear"), (llama4, ["q_proj", *LAYERS])):
        with pytest.warns(
            PeftWarning, match=r"but not the routed experts beside it.*target_parameters=\['gate_up_proj"
        ):
            get_peft_model(family.build(), LoraConfig(target_modules=given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(llama4.build(), LoraConfig(target_modules=["shared_expert.down_proj"]))
        get_peft_model(QWEN2.build(), LoraConfig(target_modules="all-linear", target_parameters=["gate_up_proj"]))


def test_what_experts_cannot_have_is_refused_by_name() -> None:
    part = r"PEFT target\(s\) gate_proj without also targeting up_proj because they are fused into gate_up_proj"
    with pytest.raises(ValueError, match=part):
        get_peft_model(CONVERTED["olmoe"].build(), LoraConfig(target_modules=["q_proj", "gate_proj"]))
    with pytest.raises(ValueError, match=r"'.*nowhere' matches no module"):
        get_peft_model(CONVERTED["olmoe"].build(), LoraConfig(target_modules=".*nowhere"))
    config = LoraConfig(target_modules=["q_proj", *LAYERS], use_dora=True)
    with pytest.raises(ValueError, match=r"down_proj, gate_proj, up_proj .* no layers.*use_dora=True does not go with"):
        get_peft_model(CONVERTED["olmoe"].build(), config)
    assert (
        set(config.target_modules) == {"q_proj", *LAYERS} and not config.rank_pattern and not config.target_parameters
    )


GPT_OSS = Family("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16})


@false_alarm
@pytest.mark.parametrize("family", [*CONVERTED.values(), QWEN2, GPT_OSS], ids=lambda family: family.model_type)
def test_training_takes_all_experts_and_no_router(family: Family) -> None:
    for targets in ({}, {"exclude_modules": ["q_proj"]}):
        model = attach(family.build(), LoraConfig(r=2, target_modules="all-linear", **targets))
        experts = [m for m in model.modules() if has_interface(m)]
        assert experts and all(set(m.parameter_targets("default")) == set(weight_names(m)) for m in experts)
        layers = {path.rpartition(".")[2] for path in model.targeted_module_names}
        assert "o_proj" in layers and ("q_proj" in layers) == (not targets), layers
        assert not {"gate", "router", "shared_expert_gate"} & (layers - {"shared_expert_gate"}), layers
        assert not any("router" in path or path.endswith("gate.weight") for path in model.targeted_parameter_names)


@pytest.mark.filterwarnings("ignore:target_modules takes .* but not the routed experts:UserWarning")
def test_training_says_which_experts_it_leaves_out() -> None:
    llama4 = Family("llama4_text", {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 96})
    with pytest.warns(
        PeftWarning, match=r"leaves out experts of Llama4.*\(gate_up_proj, down_proj\).*target_parameters"
    ):
        attach(llama4.build(), LoraConfig(r=2, target_modules="all-linear"))


def test_training_leaves_a_choice_of_experts_as_it_is() -> None:
    def targets(**fields: Any) -> set[str]:
        return set(
            attach(QWEN2.build(), LoraConfig(r=2, target_modules="all-linear", **fields)).targeted_parameter_names
        )

    experts = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
    assert targets() == experts
    assert targets(target_parameters=["down_proj"]) == {name for name in experts if "down" in name}
    assert targets(exclude_modules=["experts"]) == set()


@false_alarm
@left_out
def test_dropout_with_all_linear_acts_on_experts_and_leaves_routers_out() -> None:
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    with pytest.warns(PeftWarning, match=r"leaves out the routers of Mixtral.*lora_dropout=0.1 has no place there"):
        model = get_peft_model(CONVERTED["mixtral"].build(), config)
    experts = [m for m in model.modules() if has_interface(m)]
    assert all(set(m.parameter_targets("default")) == set(weight_names(m)) for m in experts)
    assert not any("gate.weight" in path for path in model.targeted_parameter_names)

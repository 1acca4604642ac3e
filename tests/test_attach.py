"""Which modules an adapter goes to."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from tiny import tiny_gpt2, tiny_llama
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import minipeft
from minipeft import LoraConfig, NF4Config, get_peft_model, inject_adapter_in_model, quantize_model
from minipeft.lora.find import LORA
from minipeft.utils import AuxiliaryTrainingWrapper


def targets(model: nn.Module, **config: Any) -> list[str]:
    return LORA.find(model, LoraConfig(**config), [])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ({"target_modules": ["1.self_attn.q_proj"]}, ["model.layers.1.self_attn.q_proj"]),
        ({"target_modules": {"lm_head"}}, ["lm_head"]),
        (
            {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
            ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["model.layers.1.self_attn.q_proj"]),
        (
            {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"],
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, ["model.layers.1.self_attn.q_proj"]),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
            ["model.layers.1.self_attn.q_proj"],
        ),
    ],
)
def test_names_endings_and_expressions_select_modules(config: dict[str, Any], expected: list[str]) -> None:
    assert targets(tiny_llama(), **config) == expected


def test_all_linear_takes_every_projection_but_the_head() -> None:
    plain = targets(tiny_llama(), target_modules="all-linear")
    assert len(plain) == 14 and "lm_head" not in plain
    assert targets(quantize_model(tiny_llama(), NF4Config()), target_modules="all-linear") == plain
    gpt2 = targets(tiny_gpt2(), target_modules="all-linear")
    assert {name.rpartition(".")[2] for name in gpt2} == {"c_attn", "c_proj", "c_fc"}


def test_all_linear_is_written_out_in_the_config_by_short_names() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", exclude_modules=["0.mlp.up_proj"]))
    assert model.peft_config["default"].target_modules == {
        *("down_proj", "gate_proj", "k_proj", "model.layers.1.mlp.up_proj", "o_proj", "q_proj", "v_proj"),
    }


def test_targets_of_a_known_family_may_be_left_out() -> None:
    assert {name.rpartition(".")[2] for name in targets(tiny_llama())} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="target_modules must be given: there is no usual choice for model type None"):
        targets(nn.Sequential(nn.Linear(2, 2)))


def test_adapted_models_are_matched_by_their_own_modules_alone() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    for name in ("default", "linear", "lora_A"):
        with pytest.raises(ValueError, match="matches no module"):
            model.add_adapter("second", LoraConfig(target_modules=[name]))
    model.add_adapter("second", LoraConfig(target_modules="all-linear"))
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            {"target_modules": ["q_prj"]},
            "target_modules: 'q_prj' matches no module of LlamaForCausalLM; the nearest names are q_proj",
        ),
        (
            {"target_modules": ["q_proj", "xyz"]},
            "'xyz' matches no module .*can be adapted: embed_tokens, q_proj, k_proj",
        ),
        ({"target_modules": "q_proj"}, "'q_proj' matches no module"),  # an expression matches whole names
        ({"target_modules": ["weight"]}, r"embed_tokens\.weight is a parameter, not a module"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["self_attn"]}, "is a .*LlamaAttention; LoRA adapts"),
        ({"target_modules": ["norm"]}, "is a .*LlamaRMSNorm; LoRA adapts"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["nope"]}, "modules_to_save: 'nope' matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leave none of them"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "leave none of them"),
    ],
)
def test_names_that_select_nothing_are_an_error(config: dict[str, Any], complaint: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=complaint):
        inject_adapter_in_model(LoraConfig(**config), model)
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()


def test_what_cannot_be_trained_whole_is_an_error() -> None:
    model = quantize_model(tiny_llama(), NF4Config())
    with pytest.raises(ValueError, match=r"self_attn\.o_proj' is quantized \(weight\), so it cannot be trained whole"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="'lm_head' already carries another adapter's LoraLinear"):
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_layers_whose_update_would_be_lost_are_refused() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"is read by its nn\.MultiheadAttention and not called; take 'attention'"):
        get_peft_model(attention, LoraConfig(target_modules=["out_proj"]))


def test_a_classifiers_head_is_trained_and_saved_whole() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = get_peft_model(
        LlamaForSequenceClassification(config), LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    assert model.peft_config["default"].modules_to_save == ["score"]
    assert "score.modules_to_save.default.weight" in {n for n, p in model.named_parameters() if p.requires_grad}
    model(torch.tensor([[1, 2]]), labels=torch.tensor([1])).loss.backward()


words = st.sampled_from(["layers", "0", "1", "attn", "q_proj", "v_proj", "proj"])


@given(st.lists(words, min_size=1, max_size=5), st.lists(st.lists(words, min_size=1, max_size=3), max_size=4))
def test_patterns_match_names_as_in_peft(path: list[str], keys: list[list[str]]) -> None:
    name = ".".join(path)
    pattern = {".".join(key): rank + 1 for rank, key in enumerate(keys)}
    expected = pattern.get(get_pattern_key(list(pattern), name), 100)
    assert LoraConfig(r=100, rank_pattern=pattern).settings_for(name)[0] == expected


def build_without_embeddings(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model that has no input embeddings, or more than one kind, and a batch for it."""
    torch.manual_seed(0)
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        return transformers.ResNetForImageClassification(config).eval(), pixels
    if name == "clip":
        text = {**sizes, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 49}
        vision = {**sizes, "image_size": 32, "patch_size": 16}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        return transformers.CLIPModel(config).eval(), {**pixels, "input_ids": torch.tensor([[1, 2, 49]])}
    if name == "wav2vec2":
        convolutions = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
        positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 10}
        model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes, **convolutions, **positions))
        return model.eval(), {"input_values": torch.randn(1, 400)}
    config = transformers.SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, decoder_hidden_size=8)
    return transformers.SegformerForSemanticSegmentation(config).eval(), {"pixel_values": torch.randn(1, 3, 64, 64)}


@pytest.mark.parametrize("name", ["resnet", "clip", "wav2vec2", "segformer"])
def test_models_without_embeddings_are_adapted_refused_and_freed(name: str) -> None:
    model, batch = build_without_embeddings(name)
    targets = ["convolution"] if name == "resnet" else "all-linear"
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    classes, gradients = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def unchanged() -> bool:
        same = all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        return same and state.keys() == model.state_dict().keys() and classes == [type(m) for m in model.modules()]

    refused: list[Any] = [
        LoraConfig(target_modules=["nope"]),
        LoraConfig(target_modules=targets, modules_to_save=["nope"]),
        LoraConfig(target_parameters=["nope"]),
        minipeft.PrefixTuningConfig(num_virtual_tokens=2),
        minipeft.PromptTuningConfig(num_virtual_tokens=2),
        minipeft.BottleneckConfig(target_modules=["nope"]),
    ]
    for config in refused:
        with pytest.raises(ValueError):
            get_peft_model(model, config)
        assert unchanged() and gradients == [p.requires_grad for p in model.parameters()]
    model = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        adapted = model(**batch)[0]
        model.merge_adapter()
        torch.testing.assert_close(model(**batch)[0], adapted, rtol=1e-3, atol=1e-4)
        model.unload()
        assert unchanged()
        assert not torch.equal(model(**batch)[0], adapted)


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
def test_lists_of_modules_are_not_trained_whole(kind: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, one = nn.Linear(3, 3), nn.Linear(3, 3)
            self.heads = kind([one]) if kind is nn.ModuleList else kind({"one": one})

    model = Model()
    with pytest.raises(TypeError, match=r"modules_to_save cannot be applied to modules of type Module(List|Dict)"):
        get_peft_model(model, LoraConfig(target_modules=["body"], modules_to_save=["heads"]))
    assert type(model) is Model and type(model.body) is nn.Linear


class Untied(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(self.emb(ids)))
        return out


def test_several_adapters_are_deleted_at_once() -> None:
    config = {"target_modules": ["body"], "modules_to_save": ["head"], "trainable_token_indices": {"emb": [1]}}
    model = get_peft_model(Untied(), LoraConfig(**config), "a")
    for name in ("b", "c"):
        model.add_adapter(name, LoraConfig(**config))
    with pytest.raises(ValueError, match="Adapter nope does not exist"):
        model.delete_adapter(["a", "nope"])
    beside = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    assert beside == [model.emb, model.head] and sorted(model.peft_config) == ["a", "b", "c"]
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter(["c", "a"])
    assert model.active_adapters == ["b"] and all(module._get_available_adapters() == {"b"} for module in beside)
    model.delete_adapter(["b"])
    assert not model.peft_config and not any("lora" in name for name in model.state_dict())


def test_embeddings_that_nobody_names_are_told(tmp_path: Path) -> None:
    model = get_peft_model(Untied(), LoraConfig(target_modules=["emb", "body"]))
    with pytest.warns(UserWarning, match="Could not identify embedding layer.*Untied has no get_input_embeddings"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)

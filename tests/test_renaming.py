"""Adapters whose tensors have names of old: a caller's mapping, and the renamings that transformers knows."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomize, some_ids, tiny_llama
from torch import nn

from minipeft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from minipeft.renaming import following

WEIGHTS = "adapter_model.safetensors"
OLD_TO_NEW = {r"^transformer\.h\.": "model.layers."}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An adapter of a Llama whose layers were called `transformer.h.0` when it was trained."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    stored = {name.replace("model.model.layers.", "model.transformer.h."): tensor for name, tensor in stored.items()}
    save_file(stored, tmp_path / WEIGHTS, metadata={"format": "pt"})
    return tmp_path


def expected() -> torch.Tensor:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    return model(some_ids()).logits


def test_a_caller_s_mapping_renames_as_in_peft(old: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown tensors base_model.model.transformer.h.0"):
        PeftModel.from_pretrained(tiny_llama(), old)
    ours = PeftModel.from_pretrained(tiny_llama(), old, key_mapping=OLD_TO_NEW)
    assert torch.equal(ours(some_ids()).logits, expected())
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), old, key_mapping=OLD_TO_NEW)
    torch.testing.assert_close(theirs(some_ids()).logits, ours(some_ids()).logits)
    assert (
        load_peft_weights(old, key_mapping=OLD_TO_NEW).keys()
        == peft.load_peft_weights(str(old), device="cpu", key_mapping=OLD_TO_NEW).keys()
    )


def test_the_model_s_own_table_renames_and_leaves_new_names_alone(old: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    # Carelessly written: it would match new names too.
    model._checkpoint_conversion_mapping = {"^(transformer.h|model.layers)": "model.layers"}
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), old)
    assert torch.equal(loaded(some_ids()).logits, expected())
    loaded.save_pretrained(tmp_path / "new")
    assert torch.equal(PeftModel.from_pretrained(model, tmp_path / "new")(some_ids()).logits, expected())


def test_transformers_own_renamings_are_followed() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = {**sizes, "intermediate_size": 16, "vocab_size": 32}
    vision = {"embed_dim": 16, "hidden_size": 16, "depth": 1, "num_heads": 2}
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "qkv"]))
    start = "base_model.model."
    new = [start + name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad]
    assert any("language_model" in name for name in new) and any("visual" in name for name in new)
    # Their names before transformers 4.52.
    old = [name.replace("model.model.visual", "model.visual").replace("model.language_model", "model") for name in new]
    assert not {*old} & {*new}
    renamed = following({name: torch.empty(number) for number, name in enumerate(old)}, new, model, start)
    assert {name: tensor.numel() for name, tensor in renamed.items()} == {name: n for n, name in enumerate(new)}


def test_two_names_do_not_become_one() -> None:
    model = nn.Linear(2, 2)
    model._checkpoint_conversion_mapping = {"^(a|b)": "c"}
    stored = {"a.x": torch.zeros(1), "b.x": torch.ones(1)}
    assert following(stored, ["c.x"], model, "").keys() == stored.keys()

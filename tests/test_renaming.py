"""Adapters whose tensors have names of old: a caller's mapping, and the renamings that transformers knows."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomize, some_ids, tiny_llama
from tiny_multimodal import SEEING
from torch import nn

from minipeft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
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


def write_old(model: Any, folder: Path, old: dict[str, str], **config: Any) -> None:
    """The adapter as it was saved when names started as in `old` (new start -> old start), with these fields."""
    model.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    for new, former in old.items():
        start = f"base_model.model.{new}"
        assert any(name.startswith(start) for name in tensors)
        tensors = {f"base_model.model.{former}".join(n.rsplit(start, 1)): tensor for n, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


TEXT_FIRST = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


@pytest.mark.parametrize(
    ("kind", "old"),
    [
        ("LLaVA", TEXT_FIRST),
        ("Gemma 3", TEXT_FIRST),
        ("Qwen2-VL", {"model.language_model.": "model.", "model.visual.": "visual."}),
        ("Qwen2.5-VL", {"model.language_model.": "model.", "model.visual.": "visual."}),
    ],
)
def test_adapters_of_models_with_images_from_before_transformers_4_52(
    kind: str, old: dict[str, str], tmp_path: Path
) -> None:
    """PEFT follows what is in the text model of LLaVA and Gemma 3, and leaves the rest out in silence."""
    targets = ["q_proj", "lm_head"] if old is TEXT_FIRST else ["q_proj", "qkv"]
    model = get_peft_model(SEEING[kind].build(), LoraConfig(r=2, target_modules=targets))
    randomize(model)
    write_old(model, tmp_path, old)
    loaded = PeftModel.from_pretrained(SEEING[kind].build(), tmp_path)
    batch = SEEING[kind].inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(
    "targets", [r"^language_model\.model\..*\.q_proj", ["language_model.model.layers.0.self_attn.q_proj"]]
)
def test_targets_by_old_names_go_where_the_tensors_go(targets: Any, tmp_path: Path) -> None:
    """PEFT finds no target there."""
    config = LoraConfig(target_modules=r".*language_model\.layers\.0\..*\.q_proj")
    model = get_peft_model(SEEING["LLaVA"].build(), config)
    randomize(model)
    write_old(model, tmp_path, {"model.language_model.": "language_model.model."}, target_modules=targets)
    loaded = PeftModel.from_pretrained(SEEING["LLaVA"].build(), tmp_path)
    batch = SEEING["LLaVA"].inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_lengths_of_dora_by_the_name_of_a_layer(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True)).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    old = {re.sub(r"(magnitude_vector)$", r"\1.weight", name): tensor for name, tensor in stored.items()}
    assert old.keys() != stored.keys()
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(loaded(some_ids()).logits, model(some_ids()).logits)
    ours = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    set_peft_model_state_dict(ours, old)
    torch.testing.assert_close(ours(some_ids()).logits, model(some_ids()).logits)


@pytest.mark.parametrize("head_first", [True, False])
def test_an_adapter_of_the_model_without_its_head_fits_the_one_with_it_and_back(
    head_first: bool, tmp_path: Path
) -> None:
    bases: list[Any] = [tiny_llama(), tiny_llama().model]
    first, second = bases if head_first else bases[::-1]
    adapted = get_peft_model(first, LoraConfig(target_modules=["q_proj"]))
    randomize(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(second, tmp_path)
    hidden = [getattr(model, "model", model)(some_ids()).last_hidden_state for model in (adapted, loaded)]
    assert torch.equal(*hidden)

"""LoRA over a base of which accelerate keeps a part on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomize, some_ids, tiny_llama
from transformers import AutoModelForCausalLM

from minipeft import LoraConfig, PeftModel, get_peft_model


def offloaded(tmp_path: Path) -> Any:
    folder = tmp_path / "base"
    if not folder.exists():
        tiny_llama().save_pretrained(folder)
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")


def config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"])


def test_a_new_adapter_trains_as_over_a_base_in_memory(tmp_path: Path) -> None:
    models = [get_peft_model(base, config()).train() for base in (offloaded(tmp_path), tiny_llama())]
    randomize(models[1])
    own = {name: tensor for name, tensor in models[1].state_dict().items() if "lora_" in name}
    models[0].load_state_dict(own, strict=False)
    assert not [name for name, p in models[0].named_parameters() if "lora_" in name and p.is_meta]
    for _ in range(3):
        losses = []
        for model in models:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            loss = model(some_ids(), labels=some_ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_stored_adapter_keeps_its_values_and_is_not_merged_into_nothing(tmp_path: Path) -> None:
    trained = get_peft_model(tiny_llama(), config())
    randomize(trained)
    trained.eval().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(offloaded(tmp_path), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(some_ids()).logits, trained(some_ids()).logits)
    with pytest.raises(ValueError, match=r"layers.1.* its weight is offloaded"):
        model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model(some_ids()).logits, trained(some_ids()).logits)

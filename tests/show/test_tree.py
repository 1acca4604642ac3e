"""`minipeft inspect MODEL [ADAPTER]`: the modules that are told without weights are those of a model in memory."""

import copy
import json
import math

import pytest
from command_line import ok, refused
from tiny_folder import save_model

from minipeft import LoraConfig, PrefixTuningConfig, get_peft_model
from minipeft.show.tree import grow, tree
from minipeft.train import load_base_model


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "prefix"],
)
def test_it_is_the_model_in_memory(tmp_path, config, quantize):
    folder = save_model(tmp_path / "model")
    model = get_peft_model(load_base_model(folder, quantize=quantize, device="cpu"), copy.deepcopy(config))
    model.save_pretrained(tmp_path / "adapter")
    branches = tree(str(folder), tmp_path / "adapter", quantize=quantize)
    assert branches == grow(model)
    tensors = [(b.count, t) for b in branches for t in b.tensors]
    trained = sum(count * math.prod(t.shape) for count, t in tensors if t.trainable)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    parameters = sum(count * t.nbytes for count, t in tensors if t.dtype != "nf4" and "freq" not in t.name)
    if quantize is None:
        assert parameters == sum(stored.values())
    else:
        for packed in (t for _, t in tensors if t.dtype == "nf4"):
            # Codes, 8-bit scales, a scale for 256 of these and their mean, and the tables of 16 and 256 levels.
            n = math.prod(packed.shape)
            assert packed.nbytes == n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4 + 4 * 16 + 4 * 256
            assert packed.bits == 8 * packed.nbytes / n
        assert len([t for _, t in tensors if t.dtype == "nf4"]) == 7


def test_the_command_shows_what_is_patched_where(tmp_path):
    folder = save_model(tmp_path / "model")
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_base_model(folder, device="cpu"), config).save_pretrained(tmp_path / "adapter")
    text = ok("inspect", folder, tmp_path / "adapter", "--quantize", "nf4", "--html", tmp_path / "page.html")
    (line,) = [line for line in text.splitlines() if line.strip().startswith("q_proj")]
    assert "x 2" in line and "NF4Linear" in line and "LoraNF4Linear" in line
    assert "LoraNF4Linear" in (tmp_path / "page.html").read_text()
    plain = json.loads(ok("inspect", folder, "--json"))
    assert not any(branch["patched"] for branch in plain) and plain[0]["kind"] == "LlamaForCausalLM"
    # An adapter by itself has no modules: what its files hold is told.
    held = json.loads(ok("inspect", tmp_path / "adapter", "--json", "--html", tmp_path / "adapter.html"))
    assert sorted(t["bytes"] for t in held["tensors"]) == [4 * 8 * 64] * 4 and "LORA" in held["description"][0]
    assert "lora_A" in (tmp_path / "adapter.html").read_text()
    assert "no adapter at" in refused("inspect", folder, tmp_path)
    wide = save_model(tmp_path / "wide", hidden_size=128)
    for command in (("inspect", wide, tmp_path / "adapter"), ("memory", wide, "--adapter", tmp_path / "adapter")):
        assert "layers.0.self_attn.q_proj.lora_A.weight has shape (8, 64), expected (8, 128)" in refused(*command)
    assert "do not go with" in refused("inspect", folder, "--tree", "--verify")
    assert "no model" in refused("inspect", tmp_path / "adapter", "--tree")

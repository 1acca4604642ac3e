"""The base model's layers repeated, with LoRA of their own, against PEFT and against a model built so."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from torch import nn

import minipeft
from minipeft import LoraConfig, NF4Config, PeftModel, get_peft_model, inject_adapter_in_model, quantize_model

MAP = [[0, 1], [0, 2], [1, 2]]
CONFIG: dict[str, Any] = {"target_modules": ["down_proj", "q_proj"], "task_type": "CAUSAL_LM", "r": 4}


def config(library: Any = minipeft, **fields: Any) -> Any:
    return library.LoraConfig(**{**CONFIG, "layer_replication": MAP, **fields})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(some_ids()).logits
    return out


def deeper() -> Any:
    """The tiny model with layers of its own in the places that `MAP` gives them."""
    model = tiny_llama()
    model.model.layers = nn.ModuleList([copy.deepcopy(model.model.layers[number]) for number in (0, 0, 1, 1)])
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = 4
    return model


def test_adapters_go_both_ways(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_llama(), config(peft))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=0, atol=1e-5)


def test_copies_share_weights_and_have_adapters_of_their_own() -> None:
    model = get_peft_model(tiny_llama(), config())
    layers = model.model.layers
    assert len(layers) == model.config.num_hidden_layers == 4
    up = [layer.mlp.down_proj for layer in layers]
    assert up[0].weight is up[1].weight and up[2].weight is up[3].weight and up[0].weight is not up[2].weight
    assert len({id(part.lora_A["default"].weight) for part in up}) == 4
    assert torch.equal(logits(model), logits(deeper()))
    randomize(model, scale=0.2)
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(deeper()))
    out = model.generate(some_ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = model.generate(some_ids(), max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(out, plain)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)
    assert merged.model.layers[0].mlp.down_proj.weight is not merged.model.layers[1].mlp.down_proj.weight


def test_it_trains_over_four_bits_too() -> None:
    model = get_peft_model(quantize_model(tiny_llama(), NF4Config()), config())
    model(some_ids(), labels=some_ids()).loss.backward()
    grads = [layer.self_attn.q_proj.lora_B["default"].weight.grad for layer in model.model.layers]
    assert len(grads) == 4 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_another_adapter_may_have_the_same_layers_or_say_nothing(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config())
    model.save_pretrained(tmp_path)
    model.add_adapter("same", config())
    model.add_adapter("none", LoraConfig(**CONFIG))
    model.load_adapter(tmp_path, "loaded")
    assert len(model.model.layers) == 4
    with pytest.raises(ValueError, match=r"layer_replication=\[\[0, 2\]\] is for the first adapter"):
        model.add_adapter("other", config(layer_replication=[[0, 2]]))
    plain = get_peft_model(tiny_llama(), LoraConfig(**CONFIG))
    for call in (lambda: plain.add_adapter("other", config()), lambda: plain.load_adapter(tmp_path, "other")):
        with pytest.raises(ValueError, match="is for the first adapter of a model"):
            call()
    assert len(plain.model.layers) == 2


@pytest.mark.parametrize("fields", [{"target_modules": ["nope"]}, {"layer_replication": [[0, 3]]}])
def test_what_fails_leaves_the_layers_as_they_were(fields: dict[str, Any], tmp_path: Path) -> None:
    for attach in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        model = tiny_llama()
        layers = [*model.model.layers]
        with pytest.raises(ValueError, match=r"nope|names layer 2; the model has 2"):
            attach(model, config(**fields))
        assert [*model.model.layers] == layers and model.config.num_hidden_layers == 2
    get_peft_model(tiny_llama(hidden_size=32), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(model, tmp_path)
    assert [*model.model.layers] == layers and model.config.num_hidden_layers == 2
    assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("value", [[[1, 0]], [[0]], [[0, 1.5]], "0-4", [[-1, 2]]])
def test_pairs_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="layer_replication must be a list of pairs"):
        LoraConfig(layer_replication=value)


def test_other_families_and_models_without_layers() -> None:
    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], layer_replication=[[0, 2], [1, 2]]))
    assert len(model.transformer.h) == 3 and model.config.num_hidden_layers == 3
    assert logits(model).isfinite().all()
    with pytest.raises(ValueError, match="Could not locate the layers of Sequential"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], layer_replication=[[0, 1]]))

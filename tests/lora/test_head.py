"""LoRA on the output head, whose weight is read without calling it."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import randomize, some_ids, tiny_llama

from minipeft import LoraConfig, get_peft_model

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "tied": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "tied rows": {"target_modules": ["lm_head"], "trainable_token_indices": [1, 3]},
}


def adapted(kind: str, **fields: Any) -> Any:
    model = tiny_llama(tie_word_embeddings="tied" in kind)
    config = {"r": 4, "target_modules": ["q_proj", "lm_head"], **KINDS[kind], **fields}
    model = get_peft_model(model, LoraConfig(**config))
    randomize(model, scale=0.2)
    return model


def hidden(model: Any) -> torch.Tensor:
    return model.model(some_ids()).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_who_reads_the_weight_computes_what_the_head_does(kind: str) -> None:
    model = adapted(kind)
    x = hidden(model).detach()
    grads = []
    for logits in (model.lm_head(x), F.linear(x, model.lm_head.weight)):
        torch.testing.assert_close(logits, model.lm_head(x), rtol=1e-4, atol=1e-4)
        model.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), some_ids().flatten()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parameter_and_the_base_stay_the_base_s(kind: str) -> None:
    model, plain = adapted(kind), tiny_llama(tie_word_embeddings="tied" in kind)
    assert torch.equal(model.get_parameter("lm_head.weight"), plain.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, plain.lm_head.weight)
    with model.disable_adapter():
        assert model.lm_head.weight is model.get_parameter("lm_head.weight")
        assert torch.equal(model(some_ids()).logits, plain(some_ids()).logits)
    before = model(some_ids()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(some_ids()).logits, before)
    model.merge_adapter()
    torch.testing.assert_close(model(some_ids()).logits, before, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.get_parameter("lm_head.weight")
    model.unmerge_adapter()
    assert torch.equal(model(some_ids()).logits, before)
    assert torch.equal(model.unload().lm_head.weight, plain.lm_head.weight)


def test_several_adapters_act_together_and_by_row() -> None:
    model = adapted("plain")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    randomize(model, scale=0.2)
    model.set_adapter("other")
    x = hidden(model.eval()).detach()
    torch.testing.assert_close(F.linear(x, model.lm_head.weight), model.lm_head(x), rtol=1e-4, atol=1e-4)
    other = model(some_ids()).logits
    model.set_adapter("default")
    rows = model(some_ids(), adapter_names=["other", "default"]).logits
    torch.testing.assert_close(rows[0], other[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[1], model(some_ids()).logits[1], rtol=1e-4, atol=1e-4)


def test_16_bits_stay_16_bits() -> None:
    model = get_peft_model(tiny_llama().bfloat16(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert model.lm_head.weight.dtype == torch.bfloat16
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(F.linear(x, model.lm_head.weight), model.lm_head(x), rtol=0.05, atol=0.05)

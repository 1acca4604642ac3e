"""Prompts in models that read a text in both directions: classifiers as PEFT has them, and T5."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tiny import randomize, some_ids
from tiny_encoders import BASES, ENCODER_DECODERS, tiny_encoder

import minipeft
from minipeft import PeftModel, PromptTuningConfig, get_peft_model

P = 3
EXACT = {"rtol": 0, "atol": 1e-5}
IDS = some_ids().clamp(min=3)

every_base = pytest.mark.parametrize("kind", BASES)


def prompted(kind: str, **changes: Any) -> Any:
    config = PromptTuningConfig(**{"num_virtual_tokens": P, "task_type": BASES[kind][0], **changes})
    model = get_peft_model(tiny_encoder(kind), config)
    randomize(model, scale=0.5)
    return model


def logits(model: Any, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        inputs.setdefault("decoder_input_ids", some_ids(2, 6, seed=5)[: len(ids)])
    with torch.no_grad():
        return model.eval()(ids, **inputs).logits


@every_base
def test_adapter_made_by_peft_gives_the_same_logits_here_and_back(kind: str, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=P, task_type=BASES[kind][0], num_transformer_submodules=1)
    theirs = peft.get_peft_model(tiny_encoder(kind), config)
    randomize(theirs, scale=0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    for inputs in ({}, {"attention_mask": mask}):
        expected = logits(theirs, **inputs)
        if kind == "bert_tokens":
            expected = expected[:, P:]
        ours = PeftModel.from_pretrained(tiny_encoder(kind), tmp_path / "theirs")
        torch.testing.assert_close(logits(ours, **inputs), expected, **EXACT)
        assert (logits(ours, **inputs) - logits(tiny_encoder(kind), **inputs)).abs().max() > 1e-2
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_encoder(kind), tmp_path / "ours")
    torch.testing.assert_close(logits(back, attention_mask=mask), logits(theirs, attention_mask=mask), rtol=0, atol=0)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(tiny_encoder(kind)))


def test_the_vectors_that_peft_never_uses_are_kept(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        tiny_encoder("t5"), peft.PromptTuningConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM")
    )
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_encoder("t5"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), **EXACT)
    assert minipeft.get_peft_model_state_dict(ours)["prompt_embeddings"].shape == (2 * P, 32)
    assert minipeft.get_peft_model_state_dict(prompted("t5"))["prompt_embeddings"].shape == (P, 32)


@every_base
def test_a_row_with_padding_behind_gives_what_it_gives_alone(kind: str) -> None:
    model = prompted(kind)
    row = IDS[:1, :5]
    padded = torch.nn.functional.pad(row, (0, 4))
    got = logits(model, padded, attention_mask=torch.tensor([[1] * 5 + [0] * 4]))
    if kind == "bert_tokens":
        got = got[:, :5]
    torch.testing.assert_close(got, logits(model, row), **EXACT)


def test_t5_puts_the_prompt_behind_the_padding_in_front() -> None:
    model = prompted("t5")
    row = IDS[:1, :5]
    padded = torch.nn.functional.pad(row, (4, 0))
    mask = torch.tensor([[0] * 4 + [1] * 5])
    torch.testing.assert_close(logits(model, padded, attention_mask=mask), logits(model, row), **EXACT)


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_generation_does_not_depend_on_padding_or_cache(kind: str) -> None:
    model = prompted(kind)
    rows = [IDS[:1], IDS[1:, :4]]
    batch = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (0, 5))])
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        steps = {**settings, "max_new_tokens": 6, "min_new_tokens": 6}
        alone = torch.cat([model.generate(row, attention_mask=torch.ones_like(row), **steps) for row in rows])
        assert torch.equal(model.generate(batch, attention_mask=mask, **steps), alone)
        assert torch.equal(model.generate(batch, attention_mask=mask, use_cache=False, **steps), alone)


@every_base
def test_only_the_prompt_and_the_head_are_trained_and_the_loss_falls(kind: str) -> None:
    model = prompted(kind).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("prompt_encoder" in name or "classifier" in name for name in trained)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = IDS[:, 0] % 3 if BASES[kind][0] == "SEQ_CLS" else IDS % 3
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradient(checkpointing: bool) -> torch.Tensor:
        model = prompted("t5").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS, labels=some_ids(2, 4), use_cache=False).loss.backward()
        return next(p.grad for p in model.parameters() if p.requires_grad)

    torch.testing.assert_close(gradient(True), gradient(False))


@every_base
def test_unloading_leaves_no_trace(kind: str) -> None:
    plain = prompted(kind).unload()
    assert [(n, type(m)) for n, m in plain.named_modules()] == [
        (n, type(m)) for n, m in tiny_encoder(kind).named_modules()
    ]
    assert torch.equal(logits(plain), logits(tiny_encoder(kind)))


def test_what_cannot_be_is_refused() -> None:
    model = prompted("bert")
    with pytest.raises(ValueError, match="no position_ids"):
        logits(model, position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match=r"about the text alone, \(2, 9\), got \(2, 12\)"):
        logits(model, attention_mask=torch.ones(2, 9 + P))
    t5 = prompted("t5")
    with t5.disable_adapter():
        states = t5.get_encoder()(IDS)
    with pytest.raises(ValueError, match="made with other adapters acting"):
        t5(encoder_outputs=states, attention_mask=torch.ones_like(IDS), decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="not on one that is a decoder"):
        get_peft_model(
            hf.BertLMHeadModel(hf.BertConfig(hidden_size=24, num_hidden_layers=1, is_decoder=True)),
            PromptTuningConfig(num_virtual_tokens=P),
        )

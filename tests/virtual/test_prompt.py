"""Prompt tuning: its starts and files beside PEFT's, and that it is what its definition says."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from tiny import randomize, some_ids, tiny_llama
from tiny_decoders import FAMILIES, tiny_decoder
from tiny_folder import byte_tokenizer

import minipeft
from minipeft import LoraConfig, PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model

P = 3
COMMON: dict[str, Any] = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}


def prompted(base: Any, **changes: Any) -> Any:
    return get_peft_model(base, PromptTuningConfig(**{**COMMON, **changes}))


def vectors(model: Any, name: str = "default") -> torch.Tensor:
    return minipeft.get_peft_model_state_dict(model, adapter_name=name)["prompt_embeddings"]


def logits(model: Any, ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(some_ids() if ids is None else ids, **inputs).logits


@pytest.fixture(scope="module")
def text_start(tmp_path_factory: Any) -> dict[str, Any]:
    """Arguments of a prompt that starts from a text; the tokenizer's ids are below 128 for capitals."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "ABCD", "tokenizer_name_or_path": str(folder)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_words_is_those_words(family: str) -> None:
    ids = some_ids(2, 8)
    ids[:, :P] = ids[0, :P]
    model = prompted(tiny_decoder(family))
    with torch.no_grad():
        vectors(model).copy_(model.get_input_embeddings()(ids[0, :P]))
    expected = logits(tiny_decoder(family), ids)[:, P:]
    torch.testing.assert_close(logits(model, ids[:, P:]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("start", ["RANDOM", "TEXT", "SAMPLE_VOCAB"])
def test_files_have_the_same_tensors_and_fields_as_pefts(start: str, text_start: Any, tmp_path: Path) -> None:
    arguments = {**COMMON, **(text_start if start == "TEXT" else {"prompt_tuning_init": start})}
    peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(**arguments)).save_pretrained(tmp_path / "theirs")
    prompted(tiny_llama(), **arguments).save_pretrained(tmp_path / "ours")
    described = []
    for name in ("theirs", "ours"):
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as tensors:
            shapes = {k: (tensors.get_tensor(k).shape, tensors.get_tensor(k).dtype) for k in tensors.keys()}  # noqa: SIM118
            values = json.loads((tmp_path / name / "adapter_config.json").read_text())
            described.append((tensors.metadata(), shapes, values))
    assert described[0] == described[1]
    assert described[1][1] == {"prompt_embeddings": ((P, 64), torch.float32)}


def test_names_and_counts_of_parameters_are_pefts() -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(**COMMON))
    ours = prompted(tiny_llama())
    names = {n.removeprefix("model."): p.shape for n, p in ours.named_parameters() if p.requires_grad}
    assert names == {n: p.shape for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("length", [2, 4, 7])
def test_a_text_start_is_pefts_cut_or_repeated(length: int, text_start: Any) -> None:
    arguments = {**COMMON, **text_start, "num_virtual_tokens": length}
    theirs = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(**arguments))
    assert torch.equal(vectors(prompted(tiny_llama(), **arguments)), theirs.get_prompt_embedding_to_save("default"))


def test_a_vocabulary_start_is_made_of_rows_as_the_model_looks_them_up() -> None:
    for family in ("llama", "gemma3"):  # Gemma scales what it looks up
        model = prompted(tiny_decoder(family), prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB)
        words = model.get_input_embeddings()(torch.arange(128))
        assert all((words == row).all(dim=1).any() for row in vectors(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tuning_init": "ZERO"}, "must be one of .*, got 'ZERO'"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "A"}, "needs tokenizer_name_or_path, got None"),
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}, "needs prompt_tuning_init_text, got None"),
        ({"prompt_tuning_init_text": 3}, "prompt_tuning_init_text must be text, got 3"),
        ({"tokenizer_kwargs": ["use_fast"]}, "tokenizer_kwargs must be a mapping, got"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs is for prompt_tuning_init='TEXT' alone"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not fit the model, which has 4"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompted(tiny_llama(), **changes)


def test_an_adapters_file_cannot_make_the_tokenizer_run_code(text_start: Any) -> None:
    with pytest.raises(ValueError, match="trust_remote_code would let an adapter's file run code"):
        PromptTuningConfig(**COMMON, **text_start, tokenizer_kwargs={"trust_remote_code": True})


def test_training_goes_on_from_a_saved_prompt_as_if_never_interrupted(tmp_path: Path) -> None:
    def steps(model: Any, number: int) -> Any:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(number):
            model(some_ids(), labels=some_ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    model = steps(prompted(tiny_llama()), 3)
    model.save_pretrained(tmp_path)
    resumed = steps(PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True), 3)
    assert torch.equal(vectors(resumed), vectors(steps(model, 3)))
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)


def test_padding_stands_before_the_prompt_where_pefts_stands_between(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_decoder("llama"), peft.PromptTuningConfig(**COMMON))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_decoder("llama"), tmp_path)
    row = some_ids(1, 5)
    padded = {"ids": torch.nn.functional.pad(row, (4, 0)), "attention_mask": torch.tensor([[0] * 4 + [1] * 5])}
    alone = logits(theirs, row)[:, -5:]
    torch.testing.assert_close(logits(ours, **padded)[:, -5:], alone, rtol=0, atol=2e-5)
    assert (logits(theirs, **padded)[:, -5:] - alone).abs().max() > 1e-2


def test_generation_sends_the_prompt_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted(tiny_decoder("llama"))
    encoder = model.model.prompt_encoder["default"]
    runs = []
    recorded = type(model.model).keys_and_values
    monkeypatch.setattr(type(model.model), "keys_and_values", lambda *a, **k: runs.append(1) or recorded(*a, **k))
    text = {"input_ids": some_ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long), "max_new_tokens": 6}
    before = model.generate(**text, do_sample=False)
    assert len(runs) == 1
    randomize(model, scale=1.0)
    after = model.generate(**text, do_sample=False)
    assert len(runs) == 2 and not torch.equal(before, after)
    with torch.no_grad():
        cache = model(text["input_ids"]).past_key_values
        kept = encoder.key_values[0][0]
        encoder.embedding.weight.add_(1.0)  # what a cache remembers is of the weights that filled it
        model(text["input_ids"][:, :1], past_key_values=cache)
    assert not torch.equal(encoder.key_values[0][0], kept)


def test_a_prompt_and_lora_are_trained_together() -> None:
    model = prompted(tiny_llama())
    model.add_adapter("lora", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["default", "lora"])
    randomize(model)
    model.train()(some_ids(), labels=some_ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_two_forwards_before_one_backward_give_both_gradients() -> None:
    model = prompted(tiny_llama()).train()
    model.activation_checkpointing_enable({"use_reentrant": False})

    def gradient(*seeds: int) -> torch.Tensor:
        model.zero_grad()
        losses = [model(some_ids(seed=seed), labels=some_ids(seed=seed)).loss for seed in seeds]
        sum(losses).backward()
        return next(p.grad.clone() for p in model.parameters() if p.requires_grad)

    torch.testing.assert_close(gradient(1, 2), gradient(1) + gradient(2))


def test_a_prompt_that_is_edited_while_a_text_goes_on_acts_as_it_is_now() -> None:
    """A cache remembers what prompts became: of weights that were changed in place, too."""
    model = prompted(tiny_llama())
    randomize(model)
    ids = some_ids(1, 6)
    with torch.no_grad():
        cache = model.eval()(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:5], past_key_values=cache)  # from here on it remembers
        before = model(ids[:, 5:], past_key_values=copy.deepcopy(cache)).logits
        unaware = copy.deepcopy(cache)
        del unaware._prompts
        vectors(model).mul_(-2.0)
        now = model(ids[:, 5:], past_key_values=cache).logits
        right = model(ids[:, 5:], past_key_values=unaware).logits
    assert torch.equal(now, right)
    assert not torch.allclose(now, before, atol=1e-3)

"""Prefix tuning: its starts, its projection, and its files beside PEFT's."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import randomize, some_ids, tiny_llama
from tiny_decoders import FAMILIES, tiny_decoder

import minipeft
from minipeft import PeftModel, PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_text

P = 3
EXACT = {"rtol": 0, "atol": 1e-5}
COMMON: dict[str, Any] = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}
TEXT = some_ids(1, 9)


def prefix(base: Any, **changes: Any) -> Any:
    return get_peft_model(base, PrefixTuningConfig(**{**COMMON, **changes}))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(some_ids() if ids is None else ids).logits


def projected_by_peft(directory: Path) -> Any:
    theirs = peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig(**COMMON, prefix_projection=True))
    randomize(theirs, scale=0.3)
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.parametrize("projection", [False, True])
def test_files_have_the_same_tensors_and_fields_as_pefts(projection: bool, tmp_path: Path) -> None:
    arguments = {**COMMON, "prefix_projection": projection}
    peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig(**arguments)).save_pretrained(tmp_path / "theirs")
    prefix(tiny_llama(), **arguments).save_pretrained(tmp_path / "ours")
    described = []
    for name in ("theirs", "ours"):
        with safe_open(tmp_path / name / "adapter_model.safetensors", "pt") as tensors:
            shapes = {k: (tensors.get_tensor(k).shape, tensors.get_tensor(k).dtype) for k in tensors.keys()}  # noqa: SIM118
            described.append(
                (tensors.metadata(), shapes, json.loads((tmp_path / name / "adapter_config.json").read_text()))
            )
    assert described[0] == described[1]
    assert described[1][1] == {"prompt_embeddings": ((P, 2 * 2 * 32), torch.float32)}


def test_names_and_counts_of_parameters_are_pefts() -> None:
    for projection in (False, True):
        theirs = peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig(**COMMON, prefix_projection=projection))
        ours = prefix(tiny_llama(), prefix_projection=projection)
        names = {n.removeprefix("model."): p.shape for n, p in ours.named_parameters() if p.requires_grad}
        assert names == {n: p.shape for n, p in theirs.named_parameters() if p.requires_grad}
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_projection_made_by_peft_and_by_us_give_the_same_logits_in_both(tmp_path: Path) -> None:
    theirs = projected_by_peft(tmp_path / "theirs")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")), logits(theirs), **EXACT
    )
    ours = prefix(tiny_llama(), prefix_projection=True, encoder_hidden_size=24)
    randomize(ours, scale=0.3)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(ours), **EXACT)


def test_the_projection_folds_away_for_inference(tmp_path: Path) -> None:
    model = prefix(tiny_llama(), prefix_projection=True)
    randomize(model, scale=0.3)
    model.save_pretrained(tmp_path)
    folded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert [n for n, _ in folded.named_parameters() if "prompt_encoder" in n] == [
        "model.prompt_encoder.default.embedding.weight"
    ]
    torch.testing.assert_close(logits(folded), logits(model), **EXACT)
    assert torch.equal(
        load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"],
        minipeft.get_peft_model_state_dict(model)["prompt_embeddings"],
    )


@pytest.mark.parametrize("projection", [False, True])
def test_training_goes_on_from_a_saved_prefix_as_if_never_interrupted(projection: bool, tmp_path: Path) -> None:
    def steps(model: Any, number: int) -> Any:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(number):
            model(some_ids(), labels=some_ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    torch.manual_seed(0)
    model = steps(prefix(tiny_llama(), prefix_projection=projection), 3)
    model.save_pretrained(tmp_path)
    resumed = steps(PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True), 3)
    steps(model, 3)
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == {n for n, p in resumed.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, expected[n]) for n, p in resumed.named_parameters() if n in expected)
    # PEFT cannot.
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)


def test_a_projected_prefix_of_pefts_is_trained_without_the_lost_projection(tmp_path: Path, caplog: Any) -> None:
    theirs = projected_by_peft(tmp_path)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert "without its projection" in caplog.text and not ours.peft_config["default"].prefix_projection
    torch.testing.assert_close(logits(ours), logits(theirs), **EXACT)
    assert [p.shape for p in ours.parameters() if p.requires_grad] == [(P, 2 * 2 * 32)]


def test_a_projection_beside_another_prefix_is_refused_and_a_stale_one_removed(tmp_path: Path) -> None:
    model = prefix(tiny_llama(), prefix_projection=True)
    model.save_pretrained(tmp_path)
    save_file({"prompt_embeddings": torch.ones(P, 128)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="its projection is that of another adapter"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    PeftModel.from_pretrained(tiny_llama(), tmp_path).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_training.safetensors").exists()


def test_a_state_dict_from_elsewhere_is_folded_too() -> None:
    model = prefix(tiny_llama(), prefix_projection=True)
    elsewhere = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = minipeft.get_peft_model_state_dict(model)
    randomize(model)
    got = minipeft.get_peft_model_state_dict(model, elsewhere)
    assert torch.equal(got["prompt_embeddings"], expected["prompt_embeddings"])


@pytest.mark.parametrize("broken", ["shape", "missing", "unknown"])
def test_files_that_do_not_fit_are_refused_and_the_model_is_as_before(broken: str, tmp_path: Path) -> None:
    prefix(tiny_llama()).save_pretrained(tmp_path)
    good = torch.zeros(P, 128)
    tensors = {"shape": {"prompt_embeddings": good[:2].clone()}, "missing": {"other": good}}
    tensors["unknown"] = {"prompt_embeddings": good, "more": good.clone()}
    save_file(tensors[broken], tmp_path / "adapter_model.safetensors")
    model = tiny_llama()
    with pytest.raises(ValueError, match="prompt_embeddings has shape" if broken == "shape" else "tensors"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not isinstance(model, PeftModel) and model.state_dict().keys() == tiny_llama().state_dict().keys()


def test_a_prefix_for_more_layers_is_refused(tmp_path: Path) -> None:
    prefix(tiny_llama(num_hidden_layers=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_layers=4 does not fit the model, which has 2"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("projection", [False, True])
def test_a_zero_start_takes_from_the_text_and_adds_nothing(projection: bool) -> None:
    model = prefix(tiny_llama(), init_weights="zero", prefix_projection=projection)
    assert not minipeft.get_peft_model_state_dict(model)["prompt_embeddings"].any()
    theirs = peft.get_peft_model(
        tiny_llama(), peft.PrefixTuningConfig(**COMMON, init_weights="zero", prefix_projection=projection)
    )
    torch.testing.assert_close(logits(model), logits(theirs), **EXACT)
    model(some_ids(), labels=some_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_started_from_a_text_the_model_goes_on_as_after_the_text(family: str) -> None:
    base = logits(tiny_decoder(family), TEXT)
    model = prefix(tiny_decoder(family), num_virtual_tokens=4)
    initialize_kv_prefix_from_text(model, text=TEXT[:, :4])
    # Windows of 8 see all of the prefix, but not all of a longer text.
    torch.testing.assert_close(logits(model, TEXT[:, 4:8]), base[:, 4:8], rtol=0, atol=2e-5)


class Words:
    """A tokenizer of one id a letter."""

    chat_template = None

    def __call__(self, text: str, **settings: Any) -> Any:
        ids = torch.tensor([[ord(letter) - 90 for letter in text]])
        return peft.utils.other.transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_started_from_a_text_the_prefix_is_pefts() -> None:
    ours, theirs = prefix(tiny_llama()), peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig(**COMMON))
    for text, cut in (("abcdefgh", None), ("abcd", 3)):
        got = initialize_kv_prefix_from_text(ours, Words(), text=text, max_length=cut)
        expected = peft.initialize_kv_prefix_from_text(theirs, Words(), text=text, use_chat_template=False)
        torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(logits(ours), logits(theirs), **EXACT)


def test_a_text_start_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="text has 2 tokens, a prefix of 3"):
        initialize_kv_prefix_from_text(prefix(tiny_llama()), text=TEXT[:, :2])
    with pytest.raises(ValueError, match="has a projection"):
        initialize_kv_prefix_from_text(prefix(tiny_llama(), prefix_projection=True), text=TEXT)
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        initialize_kv_prefix_from_text(prefix(tiny_llama()), text="words")
    with pytest.raises(ValueError, match="is not a prefix"):
        initialize_kv_prefix_from_text(
            get_peft_model(tiny_llama(), minipeft.LoraConfig(target_modules=["q_proj"])), text=TEXT
        )
    with pytest.raises(ValueError, match="num_virtual_tokens=9, but the adapter has 3"):
        initialize_kv_prefix_from_text(prefix(tiny_llama()), text=TEXT, num_virtual_tokens=9)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="init_weights must be None or 'zero', got 'ones'"):
        PrefixTuningConfig(**COMMON, init_weights="ones")
    with pytest.raises(ValueError, match="prefix_projection must be true or false, got 3"):
        PrefixTuningConfig(**COMMON, prefix_projection=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encoder_hidden_size must be a positive integer, got -3"):
        PrefixTuningConfig(**COMMON, encoder_hidden_size=-3)
    with pytest.raises(ValueError, match=r"num_virtual_tokens=64 leaves no position .*: transformer\.wpe has 64"):
        prefix(tiny_decoder("gpt2"), num_virtual_tokens=64)


def test_grouped_queries_take_the_keys_numbers_as_peft_does() -> None:
    arguments = {"token_dim": 64, "num_attention_heads": 4, "num_layers": 2}  # the model's; its keys have 2 heads of 16
    theirs = peft.get_peft_model(tiny_llama(), peft.PrefixTuningConfig(**COMMON, **arguments)).peft_config["default"]
    ours = prefix(tiny_llama(), **arguments).peft_config["default"]
    assert (ours.token_dim, ours.num_attention_heads) == (theirs.token_dim, theirs.num_attention_heads) == (32, 2)

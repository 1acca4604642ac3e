"""What prefix and prompt tuning share: virtual tokens that every call sees inside, and nobody outside."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomize, some_ids, tiny_llama
from tiny_decoders import FAMILIES, tiny_decoder
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForSequenceClassification,
    LlamaModel,
    MarianConfig,
    MarianMTModel,
    MptConfig,
    MptForCausalLM,
    Trainer,
    TrainingArguments,
)

import minipeft
from minipeft import (
    LoraConfig,
    NF4Config,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    quantize_model,
)

P = 3
METHODS: dict[str, Any] = {
    "prefix": (PrefixTuningConfig, peft.PrefixTuningConfig),
    "prompt": (PromptTuningConfig, peft.PromptTuningConfig),
}
EXACT = {"rtol": 0, "atol": 2e-5}
STEPS = {"max_new_tokens": 6, "do_sample": False}

every_method = pytest.mark.parametrize("method", METHODS)


def config(method: str, **changes: Any) -> Any:
    return METHODS[method][0](**{"num_virtual_tokens": P, "task_type": "CAUSAL_LM", **changes})


def adapted(method: str, base: Any, **changes: Any) -> Any:
    """`base` with virtual tokens that are far from doing nothing."""
    model = get_peft_model(base, config(method, **changes))
    randomize(model, scale=0.5)
    return model


def logits(model: Any, ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(some_ids() if ids is None else ids, **inputs).logits


def padded_left(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """(1, tokens) rows of different lengths -> ids and mask, padding first."""
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def attentions(family: str) -> tuple[str, ...]:
    return ("eager",) if family == "gemma2" else ("sdpa", "eager")


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_made_by_peft_gives_the_same_logits_here_and_back(method: str, family: str, tmp_path: Path) -> None:
    for attention in attentions(family):
        base, ids = tiny_decoder(family, attention=attention), some_ids(2, 5)  # PEFT's windows hold the prefix too
        theirs = peft.get_peft_model(base, METHODS[method][1](num_virtual_tokens=P, task_type="CAUSAL_LM"))
        randomize(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        expected = logits(theirs, ids)[:, -5:]
        ours = PeftModel.from_pretrained(tiny_decoder(family, attention=attention), tmp_path / "theirs")
        torch.testing.assert_close(logits(ours, ids), expected, **EXACT)
        assert (logits(ours, ids) - logits(tiny_decoder(family), ids)).abs().max() > 0.1
        ours.save_pretrained(tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(tiny_decoder(family, attention=attention), tmp_path / "ours")
        assert torch.equal(logits(back, ids)[:, -5:], expected)
        with ours.disable_adapter():
            assert torch.equal(logits(ours, ids), logits(tiny_decoder(family, attention=attention), ids))


@every_method
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "gpt_neox", "mistral"])
def test_a_padded_row_gives_what_it_gives_alone(method: str, family: str, attention: str) -> None:
    model = adapted(method, tiny_decoder(family, attention=attention))
    rows = [some_ids(1, 12), some_ids(1, 5, seed=3), some_ids(1, 1, seed=4)]
    batch = padded_left(rows)
    together = logits(model, batch.pop("input_ids"), **batch)
    for row, got in zip(rows, together, strict=True):
        torch.testing.assert_close(got[None, -row.shape[1] :], logits(model, row), **EXACT)


@every_method
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_packed_document_sees_the_virtual_tokens_and_no_other_document(method: str, attention: str) -> None:
    model = adapted(method, tiny_decoder("llama", attention=attention))
    documents = [some_ids(1, 5), some_ids(1, 7, seed=3)]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = logits(model, torch.cat(documents, dim=1), position_ids=positions, use_cache=False)
    alone = torch.cat([logits(model, document) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, **EXACT)


@every_method
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_generation_is_the_same_with_any_cache_and_any_padding(method: str, family: str) -> None:
    model = adapted(method, tiny_decoder(family))
    rows = [some_ids(1, 10), some_ids(1, 4, seed=3)]
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **STEPS)[0, -6:] for row in rows]
    with model.disable_adapter():
        plain = model.generate(rows[0], attention_mask=torch.ones_like(rows[0]), **STEPS)[0, -6:]
    assert not torch.equal(plain, alone[0])
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        got = model.generate(**padded_left(rows), **STEPS, **cache)[:, -6:]
        assert torch.equal(got, torch.stack(alone)), cache


@every_method
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_generation_equals_peft(method: str, tmp_path: Path) -> None:
    model = adapted(method, tiny_decoder("llama"))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_decoder("llama"), tmp_path)
    text = {"input_ids": some_ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    for settings in (STEPS, {**STEPS, "num_beams": 3}):
        expected = theirs.generate(**text, **settings)[:, -6:]
        assert torch.equal(model.generate(**text, **settings)[:, -6:], expected)


@every_method
def test_beams_and_samples_do_not_depend_on_the_cache(method: str) -> None:
    model = adapted(method, tiny_decoder("llama"))
    batch = padded_left([some_ids(1, 8), some_ids(1, 3, seed=3)])
    sampling = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
    for settings in ({**STEPS, "num_beams": 3}, sampling):
        results = []
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            torch.manual_seed(0)
            results.append(model.generate(**batch, **settings, **cache))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@every_method
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gemma2"])
def test_a_sliding_window_does_not_evict_the_virtual_tokens(method: str, family: str) -> None:
    model = adapted(method, tiny_decoder(family, attention="eager"))
    ids = some_ids(1, 20)  # the window is 8
    with torch.no_grad():
        whole = model(ids, output_attentions=True)
        pieces = []
        cache = None
        for token in ids.split([11, 1, 1, 7], dim=1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    for weights in whole.attentions:
        assert weights.shape[-2:] == (20, P + 20) and (weights[..., :P] > 0).all()
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole.logits, **EXACT)
    assert cache.get_seq_length() == 20


@every_method
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_the_logits_are_pefts_until_its_window_passes_the_virtual_tokens(
    method: str, family: str, tmp_path: Path
) -> None:
    ours, ids = adapted(method, tiny_decoder(family)), some_ids(1, 20)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_decoder(family), tmp_path)
    apart = (logits(ours, ids) - logits(theirs, ids)[:, -20:]).abs().amax(dim=(0, 2))
    inside = 8 - P  # the window is 8
    assert (apart[:inside] < EXACT["atol"]).all() and (apart[inside:] > 1e-3).all()


@every_method
def test_a_left_padded_row_has_its_own_logits_where_pefts_have_others(method: str, tmp_path: Path) -> None:
    ours, row = adapted(method, tiny_decoder("llama")), some_ids(1, 6)
    ours.save_pretrained(tmp_path)
    theirs, alone = peft.PeftModel.from_pretrained(tiny_decoder("llama"), tmp_path), logits(ours, row)
    padded = padded_left([row, some_ids(1, 9)])
    torch.testing.assert_close(logits(theirs, row)[:, -6:], alone, **EXACT)
    torch.testing.assert_close(ours(**padded).logits[:1, -6:], alone, **EXACT)
    assert (theirs(**padded).logits[:1, -6:] - alone).abs().max() > 0.01


@every_method
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_the_virtual_tokens_are_trained_and_the_loss_falls(method: str, quantized: bool, attention: str) -> None:
    base = tiny_llama()
    base.set_attn_implementation(attention)
    model = get_peft_model(quantize_model(base, NF4Config()) if quantized else base, config(method)).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    ids = some_ids()
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all((p.grad is not None) == ("prompt_encoder" in name) for name, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in frozen.items())


@every_method
@pytest.mark.parametrize("kind", [None, False, True])
def test_loss_and_gradients_equal_peft(method: str, kind: bool | None, tmp_path: Path) -> None:
    """PEFT drops a prefix under checkpointing, so that is compared with PEFT without it.

    The text's first token is no target here: PEFT's prompts are scored on it, too, from the prompt's last position.
    """
    theirs = peft.get_peft_model(tiny_llama(), METHODS[method][1](num_virtual_tokens=P, task_type="CAUSAL_LM"))
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    if kind is not None:
        ours = ours.train()
        ours.activation_checkpointing_enable({"use_reentrant": kind})
        ours.enable_input_require_grads()
    ids, mask, labels = some_ids(), torch.ones_like(some_ids()), some_ids()
    labels[:, 0] = -100
    if method == "prompt" and kind:
        with pytest.raises(ValueError, match="needs non-reentrant checkpointing"):
            ours(ids, labels=labels)
        return
    losses = [model(ids, attention_mask=mask, labels=labels).loss for model in (ours, theirs.eval())]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    ours_grad, theirs_grad = (
        next(p.grad for n, p in model.named_parameters() if "prompt_encoder" in n) for model in (ours, theirs)
    )
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-6)


@every_method
def test_a_mask_that_counts_the_virtual_tokens_is_refused(method: str) -> None:
    model = adapted(method, tiny_llama())
    with pytest.raises(ValueError, match="12 columns for 9 tokens"):
        logits(model, attention_mask=torch.ones(2, 9 + P, dtype=torch.long))
    with pytest.raises(ValueError, match="for 11 keys, but there are 12"):
        logits(model, attention_mask=torch.ones(2, 1, 9, 8, dtype=torch.bool))
    allowed = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(logits(model, attention_mask=allowed), logits(model), **EXACT)


REFUSED: dict[str, tuple[Any, str]] = {
    "marian": (
        lambda: MarianMTModel(
            MarianConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=32, pad_token_id=0)
        ),
        "does not know encoder-decoders of type 'marian'; it works on t5, mt5",
    ),
    "mpt": (
        lambda: MptForCausalLM(MptConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=32)),
        "'mpt' tells positions",
    ),
    "no transformer": (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)), "Sequential"),
}


@every_method
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_have_virtual_tokens_are_refused_and_unchanged(method: str, case: str) -> None:
    make, message = REFUSED[case]
    base = make()
    before = type(base), [type(module) for module in base.modules()], [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(method, task_type=None))
    assert before == (
        type(base),
        [type(module) for module in base.modules()],
        [p.requires_grad for p in base.parameters()],
    )


@every_method
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a positive integer, got None"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, got 0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens must be a positive integer, got True"),
        ({"num_layers": 7}, "num_layers=7 does not fit the model, which has 2"),
        ({"token_dim": 48}, "token_dim=48 does not fit"),
        ({"modules_to_save": ["nope"]}, "'nope' matches no module"),
    ],
)
def test_wrong_settings_are_named(method: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), config(method, **changes))


@every_method
def test_a_config_may_leave_the_number_open_until_a_model_asks_for_it(method: str) -> None:
    unset = config(method, num_virtual_tokens=None)
    unset.num_virtual_tokens = 3
    assert logits(get_peft_model(tiny_llama(), unset)).shape == logits(tiny_llama()).shape


@every_method
def test_adapters_of_several_methods_are_switched_and_act_together(method: str) -> None:
    model = adapted(method, tiny_llama())
    model.add_adapter("lora", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", config(method, num_virtual_tokens=5))
    randomize(model, seed=4, scale=0.3)
    alone = {}
    for name in ("default", "lora", "second"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["base"] = logits(model)
    assert torch.equal(alone["base"], logits(tiny_llama()))
    model.set_adapter(["default", "lora"])
    alone["both"] = logits(model)
    model.set_adapter(["default", "second"])
    alone["prefixes"] = logits(model)
    results = list(alone.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])
    model.set_adapter("default")
    assert torch.equal(logits(model), alone["default"])
    model.merge_adapter(["lora"])  # what is merged stands alone
    torch.testing.assert_close(logits(model), alone["lora"], rtol=0, atol=1e-5)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Setting active adapter to lora"):
        model.delete_adapter("default")
    assert model.active_adapter == "lora" and torch.equal(logits(model), alone["lora"])
    assert not any("default" in name for name in model.state_dict())


@every_method
def test_merging_virtual_tokens_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be merged: (Prefix|Prompt)Tuning changes more than the weights"):
        adapted(method, tiny_llama()).merge_and_unload()


@every_method
def test_unloading_leaves_no_trace(method: str) -> None:
    model = adapted(method, tiny_decoder("gpt2"))
    logits(model)
    plain = model.unload()
    fresh = tiny_decoder("gpt2")
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert plain.transformer.h[0].attn.__dict__.keys() == fresh.transformer.h[0].attn.__dict__.keys()
    assert torch.equal(logits(plain), logits(fresh))


@every_method
def test_a_bare_decoder_can_be_adapted(method: str) -> None:
    base = LlamaModel(tiny_llama().config).eval()
    before = base(some_ids()).last_hidden_state
    model = adapted(method, base, task_type="FEATURE_EXTRACTION")
    assert isinstance(model, PeftModel) and not torch.equal(model(some_ids()).last_hidden_state, before)
    plain = model.unload()
    assert type(plain) is LlamaModel and torch.equal(plain(some_ids()).last_hidden_state, before)


@every_method
def test_copies_and_pickles_are_independent(method: str) -> None:
    model = adapted(method, tiny_llama()).train()
    model(some_ids(), labels=some_ids()).loss.backward()
    twin = copy.deepcopy(model)
    before = logits(twin)
    assert torch.equal(before, logits(model))
    stored = pickle.dumps(model)
    randomize(model, scale=1.0)
    assert torch.equal(logits(twin), before) and not torch.equal(logits(model), before)
    assert torch.equal(logits(pickle.loads(stored)), before)


@every_method
def test_hidden_states_and_logits_are_about_the_text_alone(method: str) -> None:
    out = adapted(method, tiny_llama())(some_ids(), output_hidden_states=True)
    assert len(out.hidden_states) == 3 and {state.shape[1] for state in out.hidden_states} == {9}
    assert out.past_key_values.get_seq_length() == 9


@every_method
def test_sixteen_bit_models_keep_a_float32_adapter(method: str) -> None:
    model = adapted(method, tiny_llama().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    full = adapted(method, tiny_llama())
    torch.testing.assert_close(logits(model).float(), logits(full), rtol=0, atol=0.1)


@every_method
def test_a_model_that_sees_has_them_in_its_language_part(method: str, tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        text = {**tiny_decoder("gemma3").config.to_dict(), "dtype": None}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        settings = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4})
        return Gemma3ForConditionalGeneration(settings).eval()

    model = adapted(method, base())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.language_model.prompt_encoder.default.embedding.weight"
    ]
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    ids = some_ids(2, 5)
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids)[:, -5:], **EXACT)


@every_method
def test_the_status_names_the_adapters(method: str, tmp_path: Path) -> None:
    model = adapted(method, tiny_llama())
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "frozen")
    status = minipeft.get_model_status(model)
    assert status.requires_grad == {"default": True, "frozen": False}
    assert set(status.peft_types.values()) == {f"{method.upper()}_TUNING"}


@every_method
def test_classifier_and_its_head_are_exchanged_with_peft(method: str, tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        settings = tiny_llama().config
        settings.num_labels, settings.pad_token_id = 3, 0
        return LlamaForSequenceClassification(settings).eval()

    theirs = peft.get_peft_model(base(), METHODS[method][1](num_virtual_tokens=P, task_type="SEQ_CLS"))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), **EXACT)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert torch.equal(logits(back), logits(theirs))


@every_method
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compiled_forward_gives_the_same_loss_and_gradients(method: str) -> None:
    model = adapted(method, tiny_llama(num_hidden_layers=1))

    def run(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = forward(some_ids(), labels=some_ids(), use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    eager = run(model)
    for compiled, plain in zip(run(torch.compile(model, backend="eager")), eager, strict=True):
        torch.testing.assert_close(compiled, plain)


@every_method
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_trainer_resumes_exactly(method: str, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in some_ids(16, 8)]
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.1}
    settings.update(per_device_train_batch_size=4, num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True)

    def trainer() -> Trainer:
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), config(method))
        return Trainer(model, TrainingArguments(str(tmp_path / "run"), **settings), train_dataset=rows)

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = minipeft.get_peft_model_state_dict(whole.model)
    for name, tensor in minipeft.get_peft_model_state_dict(again.model).items():
        assert torch.equal(tensor, expected[name])

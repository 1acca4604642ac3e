"""Prefixes in models that read in both directions, and in the decoders of encoder-decoders."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tiny import randomize, some_ids
from tiny_encoders import BASES, ENCODER_DECODERS, tiny_encoder

import minipeft
from minipeft import (
    LoraConfig,
    NF4Config,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
    quantize_model,
)

P = 3
EXACT = {"rtol": 0, "atol": 2e-5}
IDS = some_ids().clamp(min=3)
LABELS = some_ids(2, 6, seed=5).clamp(min=3)
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])

every_base = pytest.mark.parametrize("kind", BASES)
every_encoder_decoder = pytest.mark.parametrize("kind", ENCODER_DECODERS)


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    return {"num_virtual_tokens": P, "task_type": BASES[kind][0], **changes}


def prefixed(kind: str, base: Any = None, **changes: Any) -> Any:
    config = PrefixTuningConfig(**settings(kind, **changes))
    model = get_peft_model(tiny_encoder(kind) if base is None else base, config)
    randomize(model, scale=0.5)
    return model


def inputs(kind: str) -> dict[str, torch.Tensor]:
    given = {"input_ids": IDS, "attention_mask": MASK}
    return {**given, "decoder_input_ids": LABELS} if kind in ENCODER_DECODERS else given


def packed(kind: str) -> Any:
    """The model in 4 bits, but for the head that is trained whole."""
    return quantize_model(tiny_encoder(kind), NF4Config(skip_modules=["classifier", "lm_head"]))


def logits(model: Any, kind: str, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{**inputs(kind), **changes}).logits


def labels(kind: str) -> torch.Tensor:
    return {"SEQ_CLS": IDS[:, 0] % 3, "TOKEN_CLS": IDS % 3, "SEQ_2_SEQ_LM": LABELS}[BASES[kind][0]]


def without_dropout(model: Any) -> Any:
    """In training mode, with the same outputs at every call."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@every_base
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("projection", [False, True])
def test_adapter_made_by_peft_gives_the_same_logits_here_and_back(
    kind: str, attention: str, projection: bool, tmp_path: Path
) -> None:
    config = peft.PrefixTuningConfig(**settings(kind, prefix_projection=projection))
    theirs = peft.get_peft_model(tiny_encoder(kind, attention), config)
    randomize(theirs, scale=0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = logits(theirs, kind)
    ours = PeftModel.from_pretrained(tiny_encoder(kind, attention), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, kind), expected, **EXACT)
    assert (logits(ours, kind) - logits(tiny_encoder(kind), kind)).abs().max() > 0.05
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_encoder(kind, attention), tmp_path / "ours")
    torch.testing.assert_close(logits(back, kind), expected, **EXACT)
    with ours.disable_adapter():
        assert torch.equal(logits(ours, kind), logits(tiny_encoder(kind, attention), kind))


@every_base
def test_files_have_the_same_tensors_and_fields_as_pefts(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_encoder(kind), peft.PrefixTuningConfig(**settings(kind)))
    ours = get_peft_model(tiny_encoder(kind), PrefixTuningConfig(**settings(kind)))
    shapes = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(theirs).items()}
    assert {n: tuple(t.shape) for n, t in minipeft.get_peft_model_state_dict(ours).items()} == shapes
    written = theirs.peft_config["default"].to_dict()
    # PEFT lists a task's heads twice.
    written["modules_to_save"] = [*dict.fromkeys(written["modules_to_save"] or ())] or None
    read = ours.peft_config["default"].to_dict()
    assert {k: v for k, v in read.items() if k != "modules_to_save"} == {
        k: v for k, v in written.items() if k != "modules_to_save"
    } | {"peft_version": read["peft_version"], "peft_type": "PREFIX_TUNING"}


@every_base
def test_loss_and_gradients_equal_peft(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_encoder(kind), peft.PrefixTuningConfig(**settings(kind)))
    randomize(theirs, scale=0.5)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_encoder(kind), tmp_path, is_trainable=True)

    def gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = without_dropout(model)(input_ids=IDS, attention_mask=MASK, labels=labels(kind)).loss
        loss.backward()
        return loss.detach(), next(p.grad for n, p in model.named_parameters() if "prompt_encoder" in n)

    for got, expected in zip(gradient(ours), gradient(theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@every_base
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = without_dropout(prefixed(kind, packed(kind)))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model(input_ids=IDS, attention_mask=MASK, labels=labels(kind)).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected)


@every_base
@pytest.mark.parametrize("quantized", [False, True])
def test_it_learns_and_leaves_the_base_bit_identical(kind: str, quantized: bool, tmp_path: Path) -> None:
    def base() -> Any:
        return packed(kind) if quantized else tiny_encoder(kind)

    model = without_dropout(get_peft_model(base(), PrefixTuningConfig(**settings(kind))))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("prompt_encoder" in name or "classifier" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=labels(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base().state_dict().items())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path), kind), logits(model, kind))


@every_base
def test_a_row_with_padding_behind_gives_what_it_gives_alone(kind: str) -> None:
    model = prefixed(kind)
    alone: dict[str, Any] = {"input_ids": IDS[1:, :5], "attention_mask": None}
    if kind in ENCODER_DECODERS:
        alone["decoder_input_ids"] = LABELS[1:]
    got = logits(model, kind)[1:]
    expected = logits(model, kind, **alone)
    torch.testing.assert_close(got[:, :5] if kind == "bert_tokens" else got, expected, **EXACT)


@every_encoder_decoder
def test_a_decoder_row_with_padding_behind_gives_what_it_gives_alone(kind: str) -> None:
    model = prefixed(kind)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    got = logits(model, kind, decoder_attention_mask=mask)[1, :4]
    expected = logits(model, kind, input_ids=IDS[1:], attention_mask=MASK[1:], decoder_input_ids=LABELS[1:, :4])[0]
    torch.testing.assert_close(got, expected, **EXACT)


@every_encoder_decoder
def test_generation_equals_peft_and_does_not_depend_on_the_cache(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(tiny_encoder(kind), peft.PrefixTuningConfig(**settings(kind)))
    randomize(theirs, scale=2.0)
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_encoder(kind), tmp_path)
    prompt = {"input_ids": IDS, "attention_mask": MASK}
    for how in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        steps: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **how}
        got = model.generate(**prompt, **steps)
        assert torch.equal(got, theirs.eval().generate(**prompt, **steps))
        for cache in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**prompt, **steps, **cache), got)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**prompt, max_new_tokens=6), got[::2])


def test_t5_tells_the_distance_to_the_prefix() -> None:
    # Without the bias by distance the prefix would look the same from everywhere.
    model = prefixed("t5")
    bias = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        plain = logits(model, "t5")
        # The bucket of a distance of 6, which only the prefix is away from the fourth token.
        bias[6] += 3.0
        moved = logits(model, "t5")
    assert torch.allclose(plain[:, :3], moved[:, :3], atol=1e-6)
    assert (plain[:, 3] - moved[:, 3]).abs().max() > 1e-3


def test_each_layer_has_keys_of_its_own_on_request() -> None:
    # PEFT reads the columns of layer 2 i mod L for layer i, so of two layers the second's do nothing.
    for submodules, unused in ((2, True), (1, False)):
        model = prefixed("t5", num_transformer_submodules=submodules)
        model(**inputs("t5"), labels=LABELS).loss.backward()
        grad = next(p.grad for p in model.parameters() if p.requires_grad)
        assert grad[:, :64].any() and grad[:, 64:].any().item() is not unused


def test_an_unusual_t5_takes_its_decoders_numbers() -> None:
    base = tiny_encoder("t5", d_kv=4, num_layers=1, num_decoder_layers=3)
    model = prefixed("t5", base)
    config = model.peft_config["default"]
    numbers = (config.token_dim, config.num_attention_heads, config.num_layers, config.num_transformer_submodules)
    assert numbers == (16, 4, 3, 2)
    assert minipeft.get_peft_model_state_dict(model)["prompt_embeddings"].shape == (P, 3 * 2 * 16)
    before = logits(model, "t5")
    randomize(model, seed=7, scale=0.5)
    assert (logits(model, "t5") - before).abs().max() > 1e-2


@every_base
def test_a_zero_start_takes_from_the_text_and_adds_nothing(kind: str) -> None:
    model = get_peft_model(tiny_encoder(kind), PrefixTuningConfig(**settings(kind, init_weights="zero")))
    assert not any(p.any() for n, p in model.named_parameters() if "prompt_encoder" in n)
    assert torch.isfinite(logits(model, kind)).all()


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_prefix_prompt_and_lora_act_together_and_alone(kind: str) -> None:
    model = prefixed(kind)
    alone = logits(model, kind)
    model.add_adapter("prompt", PromptTuningConfig(**settings(kind, num_virtual_tokens=4)))
    model.add_adapter("lora", LoraConfig(target_modules=["query"] if kind == "bert" else ["q"]))
    torch.testing.assert_close(logits(model, kind), alone, rtol=0, atol=0)
    replaced = kind == "bert"  # both train the classifier whole
    if replaced:
        with pytest.raises(ValueError, match="cannot act together: both train"):
            model.set_adapter(["default", "prompt"])
        model.delete_adapter("prompt")
        model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=4))
    model.set_adapter(["default", "prompt", "lora"])
    both = logits(model, kind)
    assert both.shape == alone.shape and (both - alone).abs().max() > 1e-3
    model.set_adapter("prompt")
    prompt = logits(model, kind)
    assert (both - prompt).abs().max() > 1e-3
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, kind), alone, rtol=0, atol=0)


@every_base
def test_unloading_leaves_no_trace(kind: str) -> None:
    model = prefixed(kind)
    twin = copy.deepcopy(model)
    plain = model.unload()
    assert [(n, type(m)) for n, m in plain.named_modules()] == [
        (n, type(m)) for n, m in tiny_encoder(kind).named_modules()
    ]
    assert torch.equal(logits(plain, kind), logits(tiny_encoder(kind), kind))
    assert not torch.equal(logits(twin, kind), logits(plain, kind))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doings
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_compiled_forward_gives_the_same_loss_and_gradients(kind: str) -> None:
    model = prefixed(kind)

    def run(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = forward(input_ids=IDS, attention_mask=MASK, labels=labels(kind)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    eager = run(model)
    torch.compiler.reset()
    for compiled, plain in zip(run(torch.compile(model, backend="eager")), eager, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="12 columns for 9 tokens"):
        logits(prefixed("bert"), "bert", attention_mask=torch.ones(2, 9 + P))
    with pytest.raises(ValueError, match="9 columns for 6 tokens"):
        logits(prefixed("t5"), "t5", decoder_attention_mask=torch.ones(2, 6 + P))
    with pytest.raises(ValueError, match="BertForSequenceClassification is no causal decoder"):
        initialize_kv_prefix_from_text(prefixed("bert"), text=IDS[:1])
    with pytest.raises(ValueError, match="not on one that is a decoder"):
        get_peft_model(
            hf.BertLMHeadModel(hf.BertConfig(hidden_size=24, num_hidden_layers=1, is_decoder=True)),
            PrefixTuningConfig(num_virtual_tokens=P),
        )
    with pytest.raises(ValueError, match="token_dim=48 does not fit the model, which has 32"):
        prefixed("t5", token_dim=48)

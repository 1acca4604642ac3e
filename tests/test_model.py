"""The model with adapters: same object, same class, adapters that come, go, act, merge and leave no trace."""

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from tiny_encoders import tiny_encoder
from torch import nn
from transformers import BertForQuestionAnswering, LlamaForCausalLM, LlamaForSequenceClassification

import minipeft
from minipeft import LoraConfig, NF4Config, PeftModel, get_peft_model, quantize_model

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(some_ids()).logits


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{**CONFIG, **changes})


def two_adapters(model: Any, **second: Any) -> Any:
    """`model` with the adapters "default" (active) and "other", both away from their start."""
    model = get_peft_model(model, lora())
    model.add_adapter("other", lora(r=2, target_modules=["v_proj", "down_proj"], **second))
    randomize(model)
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_model_that_comes_back_is_the_one_that_went_in() -> None:
    model = tiny_llama()
    base = snapshot(model)
    adapted = get_peft_model(model, lora())
    assert adapted is model
    assert isinstance(adapted, LlamaForCausalLM) and isinstance(adapted, PeftModel)
    assert type(adapted).__name__ == "LlamaForCausalLM" and type(adapted).__module__ == LlamaForCausalLM.__module__
    assert base.keys() <= adapted.state_dict().keys()
    assert adapted.unload() is model
    assert type(model) is LlamaForCausalLM
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in tiny_llama().named_modules()]
    assert model.__dict__.keys() == tiny_llama().__dict__.keys()
    assert all(torch.equal(base[name], tensor) for name, tensor in model.state_dict().items())


def test_only_the_adapter_gets_gradients_and_the_base_stays_bit_identical() -> None:
    model = get_peft_model(tiny_llama(), lora(lora_dropout=0.1)).train()
    base = snapshot(tiny_llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = some_ids()
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())


def test_adapters_are_switched_by_name_and_act_together() -> None:
    model = two_adapters(tiny_llama())
    plain = logits(tiny_llama())
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert model.active_adapter == "other" and model.active_adapters == ["other"]
    model.set_adapter(["default", "other"])
    both = logits(model)
    for one, two in ((plain, first), (first, second), (second, both), (first, both)):
        assert not torch.allclose(one, two, atol=1e-4)
    alone = copy.deepcopy(model)
    alone.delete_adapter("other")
    assert torch.equal(logits(alone), first)


def test_disabled_adapters_leave_the_base_model() -> None:
    model = two_adapters(tiny_llama(), modules_to_save=["lm_head"], bias="all")
    model.set_adapter("other")
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), merged)


def test_deleting_the_active_adapter_activates_another() -> None:
    model = two_adapters(tiny_llama())
    with pytest.warns(UserWarning, match="Adapter default was active .* Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapter == "other" and list(model.peft_config) == ["other"]
    assert not any("default" in name for name in model.state_dict())
    model.delete_adapter("other")
    assert model.active_adapters == [] and torch.equal(logits(model), logits(tiny_llama()))


MERGEABLE: dict[str, Any] = {
    "plain": lambda: get_peft_model(tiny_llama(), lora()),
    "dora": lambda: get_peft_model(tiny_llama(), lora(use_dora=True)),
    "bias": lambda: get_peft_model(tiny_llama(attention_bias=True), lora(bias="all")),
    "head": lambda: get_peft_model(tiny_llama(), lora(modules_to_save=["lm_head"])),
    "embedding": lambda: get_peft_model(tiny_llama(), lora(target_modules=["embed_tokens", "lm_head"])),
    "conv1d": lambda: get_peft_model(tiny_gpt2(), lora(target_modules=["c_attn", "c_proj"])),
    "nf4": lambda: get_peft_model(quantize_model(tiny_llama(), NF4Config()), lora(target_modules="all-linear")),
}


@pytest.mark.parametrize("case", MERGEABLE)
def test_merging_keeps_the_output_and_unmerging_the_bits(case: str) -> None:
    model = MERGEABLE[case]()
    randomize(model)
    before, adapted = snapshot(model), logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("case", MERGEABLE)
def test_merge_and_unload_gives_a_plain_model_with_the_same_output(case: str, tmp_path: Any) -> None:
    model = MERGEABLE[case]()
    randomize(model)
    adapted = logits(model)
    plain = model.merge_and_unload()
    assert plain is model and not isinstance(plain, PeftModel)
    assert not any("lora" in name or "saved" in name or "trained" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain), adapted, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(plain))


def test_bf16_merge_is_made_in_float32_and_unmerged_exactly() -> None:
    model = get_peft_model(tiny_llama().bfloat16(), lora())
    randomize(model)
    layer = model.model.layers[0].self_attn.q_proj
    original = layer.weight.detach().clone()
    delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 4.0
    model.merge_adapter()
    assert torch.equal(layer.weight, (original.double() + delta).bfloat16())
    model.unmerge_adapter()
    assert torch.equal(layer.weight, original)


@pytest.mark.parametrize("quantized", [False, True])
def test_merging_no_adapter_merges_nothing(quantized: bool) -> None:
    plain = quantize_model(tiny_llama(), NF4Config()) if quantized else tiny_llama()
    before = logits(plain)
    model = two_adapters(plain)
    model.merge_adapter()
    model.merge_adapter([])
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("requantize", [False, True])
def test_merging_into_nf4_says_what_became_of_it(requantize: bool, caplog: Any, tmp_path: Any) -> None:
    model = get_peft_model(quantize_model(tiny_llama().bfloat16(), NF4Config()), lora())
    randomize(model)
    adapted = logits(model)
    plain = model.merge_and_unload(requantize=requantize)
    assert ("quantized again" if requantize else "merged into torch.bfloat16") in caplog.text
    quantized = [m for m in plain.modules() if isinstance(m, minipeft.nf4.NF4Linear)]
    assert len(quantized) == (14 if requantize else 0)
    # Requantizing rounds; the 16-bit result only rounds to bfloat16.
    assert (logits(plain) - adapted).abs().max() < (0.5 if requantize else 0.05)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.state_dict().items())


def test_tied_embeddings_each_keep_their_own_update(tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), lora(target_modules=["embed_tokens", "lm_head"]))
    randomize(model)
    adapted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert model.get_parameter("lm_head.weight") is model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="no longer tied after merging.*Setting `tie_word_embeddings=False`"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), adapted, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(plain))


def test_unload_of_a_tied_model_keeps_it_tied() -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), lora(modules_to_save=["lm_head"]))
    randomize(model)
    plain = model.unload()
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.model.embed_tokens.weight


def test_safe_merge_refuses_non_finite_weights_and_changes_nothing() -> None:
    model = get_peft_model(tiny_llama(), lora())
    layer = model.model.layers[1].self_attn.v_proj
    layer.lora_B["default"].weight.data.fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items() if not t.isnan().any())


def test_an_adapter_that_does_not_fit_leaves_merged_adapters_merged() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    randomize(model)
    model.merge_adapter()
    before = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match="nothing_here"):
        model.add_adapter("other", LoraConfig(target_modules=["nothing_here"]))
    assert model.get_model_status().merged_adapters == ["default"]
    assert model.model.layers[0].self_attn.q_proj.weight is before


def test_merged_weights_follow_the_model_to_another_dtype() -> None:
    model = get_peft_model(tiny_llama(), lora())
    randomize(model)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model.lm_head.weight, tiny_llama().double().lm_head.weight)


@pytest.mark.parametrize("case", ["plain", "dora", "bias", "head", "embedding", "nf4"])
def test_deepcopy_is_independent(case: str) -> None:
    model = MERGEABLE[case]()
    randomize(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model)) and isinstance(twin, PeftModel)
    before = logits(twin)
    model.unload()
    assert torch.equal(logits(twin), before)


def test_a_model_with_adapters_can_be_pickled() -> None:
    model = two_adapters(quantize_model(tiny_llama(), NF4Config()), modules_to_save=["lm_head"])
    again = pickle.loads(pickle.dumps(model))
    for twin in (model, again):
        twin.set_adapter("other")
    assert torch.equal(logits(again), logits(model))
    assert type(again.unload().dequantize()) is LlamaForCausalLM


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = quantize_model(tiny_llama(), NF4Config())
        model = minipeft.prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": reentrant})
        torch.manual_seed(0)
        model = get_peft_model(model, lora(target_modules="all-linear")).train()
        randomize(model)
        model(some_ids(), labels=some_ids()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for with_, without in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(with_, without)


def test_kbit_preparation_does_not_upcast_frozen_parameters() -> None:
    model = tiny_llama().bfloat16()
    minipeft.prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_generation_merged_and_unmerged_agree() -> None:
    model = get_peft_model(tiny_llama(), lora())
    randomize(model, scale=0.3)
    prompt = {"input_ids": some_ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    adapted = model.generate(**prompt, **settings)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**prompt, **settings), adapted)
    model.merge_adapter()
    assert torch.equal(model.generate(**prompt, **settings), adapted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compiled_qlora_model_gives_the_same_loss_and_gradients() -> None:
    model = get_peft_model(quantize_model(tiny_llama(), NF4Config()), lora())
    randomize(model)

    def run(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = forward(some_ids(), labels=some_ids()).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    eager = run(model)
    for compiled, plain in zip(run(torch.compile(model, backend="aot_eager")), eager, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_parameter_count_sees_through_the_packing() -> None:
    plain = get_peft_model(tiny_llama(), lora()).get_nb_trainable_parameters()
    packed = get_peft_model(quantize_model(tiny_llama(), NF4Config()), lora())
    assert packed.get_nb_trainable_parameters() == plain


def test_trainable_parameters_are_printed_as_peft_does(capsys: Any) -> None:
    get_peft_model(tiny_llama(), lora()).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 1,792 || all params: 79,936 || trainable%: 2.2418\n"


def test_injected_adapter_works_without_the_mixin() -> None:
    model = minipeft.inject_adapter_in_model(lora(), tiny_llama())
    randomize(model)
    assert not isinstance(model, PeftModel)
    state = minipeft.get_peft_model_state_dict(model)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in state
    twin = minipeft.inject_adapter_in_model(lora(), tiny_llama())
    minipeft.set_peft_model_state_dict(twin, state)
    assert torch.equal(logits(twin), logits(model))


def test_a_module_that_is_no_transformer_can_be_adapted() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *("0.lora_A.default.weight", "0.lora_B.default.weight"),
        *("2.modules_to_save.default.weight", "2.modules_to_save.default.bias"),
    }
    before = net(torch.ones(1, 4))
    randomize(model)
    assert not torch.equal(model(torch.ones(1, 4)), before)


def test_one_module_may_be_adapted_differently_by_two_adapters() -> None:
    model = get_peft_model(tiny_llama(attention_bias=True), lora(target_modules=["q_proj"], bias="all"))
    model.add_adapter("second", lora(target_modules=["v_proj"], bias="lora_only"))
    randomize(model)
    first = logits(model)
    assert "model.layers.0.self_attn.v_proj.bias" in _short(minipeft.get_peft_model_state_dict(model))
    second = _short(minipeft.get_peft_model_state_dict(model, adapter_name="second"))
    assert "model.layers.0.self_attn.v_proj.base_layer.bias" in second
    model.set_adapter("second")
    assert not torch.allclose(logits(model), first, atol=1e-4)
    with pytest.raises(ValueError, match=r"'default' and 'second' cannot act together: both train .*bias"):
        model.set_adapter(["default", "second"])


def _short(state: dict[str, Any]) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in state}


def test_a_bias_inside_a_module_that_is_trained_whole_belongs_to_its_copy(tmp_path: Any) -> None:
    config = lora(target_modules=["q_proj"], bias="all", modules_to_save=["layers.1.mlp"])
    model = get_peft_model(tiny_llama(mlp_bias=True, attention_bias=True), config)
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(mlp_bias=True, attention_bias=True), tmp_path)
    assert torch.equal(logits(again), logits(model))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_embeddings_are_not_resized_under_an_adapter_that_trains_them() -> None:
    for config in (lora(modules_to_save=["lm_head"]), lora(target_modules=["embed_tokens"])):
        with pytest.raises(ValueError, match="which cannot be resized under them: resize the base model first"):
            get_peft_model(tiny_llama(), config).resize_token_embeddings(140)
    model = get_peft_model(tiny_llama(), lora())
    assert model.resize_token_embeddings(140).weight.shape[0] == 140
    assert isinstance(model, PeftModel)


def test_tied_embeddings_with_adapters_can_be_saved(tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), lora(target_modules=["embed_tokens", "lm_head"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_saving_while_merged_saves_the_same(tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(), lora(target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]))
    randomize(model)
    expected = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


def test_an_adapter_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(), lora())
    before = model.state_dict().keys()
    calls = []

    def out_of_memory(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("minipeft.lora.layer.LoraLayer._init_factors", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model.add_adapter("second", lora(target_modules="all-linear"))
    assert model.state_dict().keys() == before and list(model.peft_config) == ["default"]
    monkeypatch.undo()
    model.add_adapter("second", lora(target_modules="all-linear"))
    model.save_pretrained(tmp_path)


def test_a_loaded_adapter_acts_without_dropout(tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(), lora(lora_dropout=0.5))
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama().train(), tmp_path)
    assert not again.training and torch.equal(logits(again), logits(model.eval()))


def test_the_adapter_that_is_loaded_or_made_acts(tmp_path: Any) -> None:
    two_adapters(tiny_llama()).save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), lora())
    PeftModel.from_pretrained(model, tmp_path / "other", adapter_name="second")
    assert model.active_adapter == "second"
    injected = minipeft.inject_adapter_in_model(lora(), tiny_llama(), "one")
    with pytest.warns(UserWarning, match="for a second time"):
        assert get_peft_model(injected, lora(), "two").active_adapter == "two"


def test_stored_values_are_not_loaded_under_other_settings(tmp_path: Any) -> None:
    get_peft_model(tiny_llama(), lora(lora_alpha=64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the adapter 'default' .* lora_alpha is 64, expected 16"):
        get_peft_model(tiny_llama(), lora()).load_adapter(tmp_path, "default")


def test_a_state_of_other_adapters_is_refused() -> None:
    model = get_peft_model(tiny_llama(), lora())
    for other in (lora(target_modules=["o_proj", "v_proj"]), lora(r=2), lora(target_modules=["o_proj"])):
        state = get_peft_model(tiny_llama(), other).state_dict()
        adapters_alone = {name: tensor for name, tensor in state.items() if "lora_" in name}
        with pytest.raises(ValueError, match="the state of adapters does not fit this model"):
            model.load_state_dict(adapters_alone, strict=False)


def test_a_checkpoint_of_what_is_trained_is_loaded() -> None:
    source, model = two_adapters(tiny_llama()), two_adapters(tiny_llama())
    randomize(source)
    state = {name: p.detach().clone() for name, p in source.named_parameters() if p.requires_grad}
    assert state and all(".default." in name for name in state)
    result = model.load_state_dict(state, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if name in state)
    frozen = {name: p for name, p in model.named_parameters() if name not in state}
    assert all(torch.equal(p, dict(two_adapters(tiny_llama()).named_parameters())[name]) for name, p in frozen.items())
    left_out = next(iter(state))
    del state[left_out]
    assert model.load_state_dict(state, strict=False).missing_keys == [left_out]


def test_a_part_of_an_adapter_is_loaded_and_the_rest_told() -> None:
    source, model = two_adapters(tiny_llama()), two_adapters(tiny_llama())
    randomize(source)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    part = {name: p.detach() for name, p in source.named_parameters() if "lora_A.default" in name and "v_proj" in name}
    result = model.load_state_dict(part, strict=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(result.missing_keys) == trained - part.keys() and not result.unexpected_keys
    for name, p in model.named_parameters():
        assert torch.equal(p, part.get(name, before[name])), name
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(part)


def test_status_tells_what_is_attached() -> None:
    model = two_adapters(tiny_llama())
    model.merge_adapter(["other"])
    status = minipeft.get_model_status(model)
    assert status.available_adapters == ["default", "other"] and status.active_adapters == ["default"]
    assert status.merged_adapters == ["other"] and status.enabled
    assert status.requires_grad == {"default": True, "other": False}
    layers = {layer.name: layer for layer in minipeft.get_layer_status(model)}
    assert len(layers) == status.num_adapter_layers == 6
    assert layers["model.model.layers.0.mlp.down_proj"].available_adapters == ["other"]


def test_the_model_tells_its_own_status() -> None:
    model = two_adapters(tiny_llama())
    assert model.get_model_status() == minipeft.get_model_status(model)
    assert model.get_layer_status() == minipeft.get_layer_status(model)


def test_gradients_are_turned_on_and_off_by_adapter() -> None:
    model = two_adapters(tiny_llama())
    model.set_requires_grad("other")
    assert minipeft.get_model_status(model).requires_grad == {"default": True, "other": True}
    model.set_requires_grad(["default", "other"], False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="Adapter nope does not exist"):
        model.set_requires_grad("nope")


def test_adapters_can_be_disabled_until_further_notice() -> None:
    model = two_adapters(tiny_llama())
    before = logits(model)
    model.merge_adapter()
    model.disable_adapter_layers()
    assert torch.equal(logits(model), logits(tiny_llama()))
    model.enable_adapter_layers()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("CausalLM", lambda: tiny_llama()),
        ("CausalLM", lambda: tiny_gpt2()),
        ("SequenceClassification", lambda: LlamaForSequenceClassification(tiny_llama().config)),
        ("TokenClassification", lambda: tiny_encoder("bert_tokens")),
        ("Seq2SeqLM", lambda: tiny_encoder("t5")),
        ("QuestionAnswering", lambda: BertForQuestionAnswering(tiny_encoder("bert").config)),
        ("FeatureExtraction", lambda: tiny_llama().model),
    ],
)
def test_a_model_is_of_the_kind_that_peft_has_for_its_task(kind: str, make: Any) -> None:
    model = get_peft_model(make(), LoraConfig())
    assert isinstance(model, getattr(minipeft, f"PeftModelFor{kind}"))
    others = [name for name in minipeft.__all__ if re.fullmatch(f"PeftModelFor(?!{kind}).*", name)]
    assert len(others) == 5 and not any(isinstance(model, getattr(minipeft, name)) for name in others)
    assert type(model.unload()) is type(make())


def test_constructing_a_peft_model_is_get_peft_model() -> None:
    base = tiny_llama()
    model = minipeft.PeftModelForCausalLM(base, lora(), "mine")
    assert model is base and model.active_adapter == "mine"
    assert torch.equal(logits(model), logits(tiny_llama()))
    # And its class still makes plain models.
    assert isinstance(type(model)(base.config), LlamaForCausalLM)


@pytest.mark.parametrize(
    ("act", "error", "complaint"),
    [
        (lambda m: m.set_adapter("nope"), ValueError, r"Adapter nope does not exist; there are \['default'\]"),
        (lambda m: m.delete_adapter("nope"), ValueError, "Adapter nope does not exist"),
        (lambda m: m.merge_adapter(["nope"]), ValueError, "Adapter nope does not exist"),
        (lambda m: m.add_adapter("default", lora()), ValueError, "Adapter with name 'default' already exists"),
        (lambda m: m.add_adapter("a.b", lora()), ValueError, "adapter name 'a.b' must be made of"),
        (lambda m: m.add_adapter("keys", lora()), ValueError, "adapter name 'keys' is the name of something"),
        (
            lambda m: m.load_adapter("no/where", "x"),
            FileNotFoundError,
            "no adapter at 'no/where': .* no folder",
        ),
        (
            lambda m: m.add_adapter(lora(), "x"),
            TypeError,
            "peft_config must be minipeft's LoraConfig .* got builtins.str",
        ),
        (lambda m: m.save_pretrained("x", safe_serialization=False), ValueError, "would write a pickle"),
        (lambda m: m.save_pretrained("x", push_to_hub=True), ValueError, "push_to_hub=True"),
        (lambda m: m.save_pretrained("x", selected_adapters=["nope"]), ValueError, "Adapter nope does not exist"),
    ],
)
def test_misuse_is_an_error_that_names_the_value(act: Any, error: type, complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        act(get_peft_model(tiny_llama(), lora()))


def test_a_config_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    gradients = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="nope"):
        get_peft_model(model, lora(target_modules=["q_proj", "nope"]))
    assert type(model) is LlamaForCausalLM and [p.requires_grad for p in model.parameters()] == gradients
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()


def test_a_config_that_names_another_base_model_is_corrected_with_a_warning() -> None:
    for named, kept in (("another", None), (None, None)):
        config = lora(base_model_name_or_path=named)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            get_peft_model(tiny_llama(), config)
        said = [str(one.message) for one in caught if one.category is minipeft.PeftWarning]
        assert any(f"was renamed from '{named}' to 'None'" in message for message in said) is bool(named)
        assert config.base_model_name_or_path is kept


def test_mixed_is_taken_since_adapters_of_all_methods_mix() -> None:
    model = get_peft_model(tiny_llama(), lora(), mixed=True)
    assert torch.equal(logits(model), logits(minipeft.PeftMixedModel(tiny_llama(), lora())))

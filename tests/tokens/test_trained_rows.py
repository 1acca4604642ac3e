"""Trained rows of embeddings, against PEFT's trainable tokens, a dense weight and finite differences."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from tiny import VOCABULARY, randomize, some_ids, tiny_gpt2, tiny_llama
from torch import nn

import minipeft
from minipeft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model

IDS = some_ids()
TOKENS = sorted({*IDS.flatten().tolist()[:3], 0, VOCABULARY - 1})


def with_lora(library: Any, tokens: Any, **fields: Any) -> Any:
    return library.LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=tokens, **fields)


def alone(library: Any, tokens: Any, **fields: Any) -> Any:
    return library.TrainableTokensConfig(token_indices=tokens, **fields)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> torch.Tensor:
    out: torch.Tensor = model(ids, **arguments).logits
    return out


def trained(config: Any, tied: bool, adapter: str = "default", dtype: torch.dtype = torch.float32) -> Any:
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied).to(dtype), config, adapter)
    randomize(model, adapter=adapter)
    return model.eval()


@pytest.mark.parametrize("make", [with_lora, alone])
@pytest.mark.parametrize("tied", [True, False])
def test_files_move_in_both_directions(make: Any, tied: bool, tmp_path: Any) -> None:
    model = trained(make(minipeft, TOKENS), tied)
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)
    stored = [minipeft.load_peft_weights(tmp_path / name).keys() for name in ("ours", "theirs")]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("tied", [True, False])
def test_rows_act_as_a_dense_weight_with_those_rows(tied: bool) -> None:
    model = trained(alone(minipeft, TOKENS), tied)
    rows = model.get_input_embeddings().trainable_tokens_delta["default"]
    plain = tiny_llama(tie_word_embeddings=tied)
    with torch.no_grad():
        plain.get_input_embeddings().weight[TOKENS] = rows
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    torch.testing.assert_close(model.get_output_embeddings().weight, plain.get_output_embeddings().weight)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_chosen_rows_get_gradients(tied: bool) -> None:
    model = trained(alone(minipeft, TOKENS), tied).double()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"model.embed_tokens.token_adapter.trainable_tokens_delta.default"}
    rows = model.get_input_embeddings().trainable_tokens_delta["default"]
    model(IDS, labels=IDS).loss.backward()
    plain = tiny_llama(tie_word_embeddings=tied).double()
    weight = plain.get_input_embeddings().weight
    with torch.no_grad():
        weight[TOKENS] = rows
    plain(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(rows.grad, weight.grad[TOKENS])


@pytest.mark.parametrize("make", [with_lora, alone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabling_and_unmerging_bring_the_base_back_bit_for_bit(make: Any, dtype: torch.dtype) -> None:
    base = logits(tiny_llama(tie_word_embeddings=True).to(dtype))
    model = trained(make(minipeft, TOKENS), True, dtype=dtype)
    acting = logits(model)
    assert not torch.equal(acting, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    original = model.get_input_embeddings()._parameters["weight"]
    model.merge_adapter()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(logits(model), acting, **tolerance)
    model.unmerge_adapter()
    assert model.get_input_embeddings()._parameters["weight"] is original
    assert model.get_output_embeddings()._parameters["weight"] is original
    assert torch.equal(logits(model), acting)
    assert torch.equal(logits(model.unload()), base)


def test_a_merged_model_stays_tied_and_holds_the_rows() -> None:
    model = trained(with_lora(minipeft, TOKENS), True)
    acting, rows = logits(model), model.get_input_embeddings().trainable_tokens_delta["default"].detach()
    plain = model.merge_and_unload()
    assert type(plain.get_input_embeddings()) is nn.Embedding and type(plain.lm_head) is nn.Linear
    assert plain.get_input_embeddings().weight is plain.lm_head.weight
    assert torch.equal(plain.lm_head.weight[TOKENS], rows)
    torch.testing.assert_close(logits(plain), acting)


def test_lora_on_a_tied_head_merges_beside_the_rows() -> None:
    config = LoraConfig(target_modules=["lm_head"], r=2, trainable_token_indices=TOKENS)
    model = trained(config, True)
    acting = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), acting)
    model.unmerge_adapter()
    assert torch.equal(logits(model), acting)


def test_several_adapters_have_rows_of_their_own() -> None:
    model = trained(with_lora(minipeft, [1, 2]), True, "one")
    model.add_adapter("two", with_lora(minipeft, [2, 3]))
    model.add_adapter("three", with_lora(minipeft, [4]))
    for seed, name in enumerate(("two", "three")):
        randomize(model, seed=seed, adapter=name)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    base = tiny_llama(tie_word_embeddings=True).get_input_embeddings()(ids)
    for name, changed in (("one", [0, 1]), ("two", [1, 2]), ("three", [3])):
        model.set_adapter(name)
        out = model.get_input_embeddings()(ids)
        differs = (out != base).any(-1)[0].nonzero().flatten().tolist()
        assert differs == changed
    by_row = model(ids.repeat(4, 1), adapter_names=["one", "two", "three", "__base__"]).logits
    for row, name in enumerate(("one", "two", "three")):
        model.set_adapter(name)
        torch.testing.assert_close(by_row[row], logits(model, ids)[0])
    with model.disable_adapter():
        torch.testing.assert_close(by_row[3], logits(model, ids)[0])
    with pytest.raises(ValueError, match=r"embed_tokens.weight\[2\]"):
        model.set_adapter(["one", "two"])
    model.set_adapter(["one", "three"])
    together = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), together)
    model.unmerge_adapter()
    model.delete_adapter("one")
    assert list(model.get_input_embeddings().trainable_tokens_delta) == ["two", "three"]


def test_another_adapter_may_follow_or_go_its_own_way() -> None:
    model = trained(with_lora(minipeft, [1, 2]), True, "tied")
    model.add_adapter("apart", with_lora(minipeft, {"embed_tokens": [1], "lm_head": [2]}))
    randomize(model, adapter="apart")
    model.set_adapter("apart")
    base, weight = tiny_llama().get_input_embeddings().weight, model.lm_head.weight
    assert (weight != base).any(1).nonzero().flatten().tolist() == [2]
    model.merge_adapter()
    assert (model.lm_head.weight != base).any(1).nonzero().flatten().tolist() == [2]
    model.unmerge_adapter()
    model.set_adapter("tied")
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_follow_their_own_rows(copied: Any) -> None:
    model = trained(with_lora(minipeft, TOKENS), True)
    twin = copied(model)
    assert torch.equal(logits(twin), logits(model))
    before = logits(model)
    randomize(twin, seed=9)
    assert twin.lm_head.token_adapter is twin.get_input_embeddings().token_adapter
    assert torch.equal(twin.lm_head.weight, twin.get_input_embeddings().weight)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)


def test_a_state_dict_round_trips() -> None:
    model = trained(with_lora(minipeft, TOKENS), True)
    other = get_peft_model(tiny_llama(tie_word_embeddings=True), with_lora(minipeft, TOKENS))
    state = minipeft.get_peft_model_state_dict(model)
    assert [key for key in state if "embed" in key or "head" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    minipeft.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other.eval()), logits(model))
    third = get_peft_model(tiny_llama(tie_word_embeddings=True), with_lora(minipeft, TOKENS)).eval()
    third.load_state_dict(model.state_dict())
    assert torch.equal(logits(third), logits(model))


def test_rows_over_a_4_bit_model() -> None:
    model = tiny_llama()
    minipeft.quantize_model(model)
    base = logits(model)
    model = get_peft_model(model, with_lora(minipeft, TOKENS)).eval()
    randomize(model)
    acting = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), acting)
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), base)


def test_a_head_without_rows_of_its_own_is_left_alone() -> None:
    model = trained(with_lora(minipeft, {"lm_head": [1]}), True)
    assert (model.lm_head.weight != model.get_input_embeddings().weight).any(1).nonzero().flatten().tolist() == [1]


def test_gpt2_takes_its_embedding_by_name() -> None:
    config = LoraConfig(target_modules=["c_attn"], r=2, trainable_token_indices={"wte": [3, 1]})
    model = get_peft_model(tiny_gpt2(), config).eval()
    randomize(model)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"trainable_token_indices": [VOCABULARY]}, ValueError, "resize"),
        ({"trainable_token_indices": [-1]}, ValueError, "different token numbers"),
        ({"trainable_token_indices": [4, 4]}, ValueError, "different token numbers"),
        ({"trainable_token_indices": {"nope": [1]}}, ValueError, r"Target modules \{'nope'\} not found"),
        ({"trainable_token_indices": {"q_proj": [1]}}, TypeError, "cannot be applied to modules of type"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, TypeError, "cannot be applied"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, ValueError, "already marked"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(fields: Any, error: Any, words: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(error, match=words):
        get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **fields}))
    assert type(model.get_input_embeddings()) is nn.Embedding and not hasattr(model, "peft_config")


def test_tied_modules_with_unlike_rows_are_refused_where_tying_is_asked_for() -> None:
    config = with_lora(minipeft, {"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True)
    with pytest.raises(ValueError, match="Cannot ensure weight tying when different token indices"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), config)


def test_rows_may_start_from_random_numbers() -> None:
    model = get_peft_model(tiny_llama(), TrainableTokensConfig(token_indices=[1, 2], init_weights=False))
    embedding = model.get_input_embeddings()
    assert not torch.equal(embedding.weight[1], embedding.trainable_tokens_original["default"][0])


def test_the_rows_that_trained_ones_replace_are_there() -> None:
    model = get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 3]})
    )
    rows = model.model.embed_tokens.token_adapter.trainable_tokens_original
    assert set(rows) == {"default"}
    assert torch.equal(rows["default"], tiny_llama().model.embed_tokens.weight[[1, 3]])


def test_one_module_is_not_trained_whole_and_by_rows_in_either_order() -> None:
    whole = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 3]})
    for first, second in ((whole, rows), (rows, whole)):
        model = get_peft_model(tiny_llama(), copy.deepcopy(first))
        before = model(some_ids()).logits
        with pytest.raises(ValueError, match="embed_tokens"):
            model.add_adapter("second", copy.deepcopy(second))
        assert torch.equal(model(some_ids()).logits, before)


def test_adapters_without_rows_do_not_act_in_the_embedding() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("other", with_lora(minipeft, [1, 2]))
    assert model.model.embed_tokens.active_adapters == []
    model.set_adapter("other")
    assert model.model.embed_tokens.active_adapters == ["other"] and model.model.embed_tokens._adapters == {"other"}


def test_ties_that_are_asked_for_and_not_there_are_told() -> None:
    with (
        pytest.warns(UserWarning, match="no tied modules were found in the model"),
        pytest.warns(UserWarning, match="ensure_weight_tying=True but the model does not have tied weights"),
    ):
        get_peft_model(tiny_llama(), with_lora(minipeft, [1, 2], ensure_weight_tying=True))


def test_a_follower_without_adapters_has_no_rows() -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), with_lora(minipeft, [1, 2]))
    assert model.lm_head.token_indices == {"default": [1, 2]}
    model.delete_adapter("default")
    assert model.lm_head.token_indices == {} and not [*model.lm_head.trainable_tokens_delta]
    assert not any("token_adapter" in name for name in model.lm_head.state_dict())

"""`add_weighted_adapter` against PEFT 0.21.2, and against what the combination means."""

import inspect
import typing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import merge_utils
from tiny import randomize, some_ids, tiny_llama

import minipeft
from minipeft.lora.combine import KINDS, Combination

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
FIRST = {**CONFIG, "target_modules": ["q_proj", "v_proj"]}
SECOND = {**CONFIG, "target_modules": ["v_proj", "down_proj"], "lora_alpha": 6}
WEIGHTS = [0.7, -1.3]


def two(library: Any, model: Any = None, **second: Any) -> Any:
    """A model with the random adapters "default" and "other", alike in both libraries."""
    model = library.get_peft_model(model or tiny_llama(), library.LoraConfig(**FIRST))
    model.add_adapter("other", library.LoraConfig(**{**SECOND, **second}))
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if "lora_" in name:
            seed = sum(name.removeprefix("base_model.model.").encode())
            tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    return model


def factors_of(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {n.removeprefix("base_model.model."): t for n, t in state.items() if f".{adapter}.weight" in n}


def updates_of(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Dotted name -> B A of an adapter whose scaling is 1."""
    tensors = factors_of(model, adapter)
    return {
        name.partition(".lora_A")[0]: tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        for name in tensors
        if "lora_A" in name
    }


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("linear", {}),
        ("cat", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.4}),
    ],
)
def test_factors_equal_peft_s(kind: str, extra: dict[str, Any]) -> None:
    ours, theirs = two(minipeft), two(peft)
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type=kind, **extra)
    assert factors_of(ours, "both").keys() == factors_of(theirs, "both").keys()
    for name, tensor in factors_of(theirs, "both").items():
        torch.testing.assert_close(factors_of(ours, "both")[name], tensor, rtol=1e-6, atol=1e-7)
    for model in (ours, theirs):
        model.set_adapter("both")
    torch.testing.assert_close(ours(some_ids()).logits, theirs(some_ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("rank", [None, 7])
def test_updates_equal_peft_s(kind: str, rank: int | None) -> None:
    extra = {} if kind == "svd" else {"density": 0.4}
    ours, theirs = two(minipeft, r=6), two(peft, r=6)
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type=kind, svd_rank=rank, **extra)
    for name, update in updates_of(theirs, "both").items():
        torch.testing.assert_close(updates_of(ours, "both")[name], update, rtol=1e-4, atol=1e-5)
    assert {t.shape[0] for n, t in factors_of(ours, "both").items() if "lora_A" in n} == {rank or 6}


def test_clamping_equals_peft_s() -> None:
    ours, theirs = two(minipeft), two(peft)
    for model in (ours, theirs):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", svd_clamp=0.9)
    # The sign of a singular vector is free, and clamping keeps it: so B A is the same.
    for name, update in updates_of(theirs, "both").items():
        torch.testing.assert_close(updates_of(ours, "both")[name], update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_draws_what_peft_draws(kind: str) -> None:
    tensors = [torch.randn(9, 5), torch.randn(9, 5)]
    torch.manual_seed(4)
    expected = getattr(merge_utils, kind)(tensors, torch.tensor(WEIGHTS), 0.6)
    torch.manual_seed(4)
    torch.testing.assert_close(Combination(kind, density=0.6).sum(tensors, WEIGHTS), expected)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties_svd"])
def test_a_generator_makes_dare_repeatable(kind: str) -> None:
    model = two(minipeft)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        generator = torch.Generator().manual_seed(seed)
        model.add_weighted_adapter(
            ["default", "other"], WEIGHTS, name, combination_type=kind, density=0.5, generator=generator
        )
    one, again, other = (updates_of(model, name) for name in ("one", "again", "two"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_cat_is_the_weighted_sum_of_the_updates() -> None:
    model = two(minipeft, r=2)
    model.add_weighted_adapter(["default", "other"], WEIGHTS, "both", combination_type="cat")
    layer = model.model.layers[0].self_attn.v_proj
    expected = 0.7 * layer.delta_weight("default") - 1.3 * layer.delta_weight("other")
    torch.testing.assert_close(layer.delta_weight("both"), expected)
    # A layer that only one of them adapts, padded with zeros to the common rank.
    layer = model.model.layers[0].mlp.down_proj
    torch.testing.assert_close(layer.delta_weight("both"), -1.3 * layer.delta_weight("other"))
    assert model.peft_config["both"].r == 6 and len(layer.factors("both")[0]) == 6


def test_embeddings_and_4_bit_layers_combine() -> None:
    model = minipeft.quantize_model(tiny_llama(), minipeft.NF4Config())
    config = {**CONFIG, "target_modules": ["embed_tokens", "q_proj"]}
    model = minipeft.get_peft_model(model, minipeft.LoraConfig(**config))
    model.add_adapter("other", minipeft.LoraConfig(**config))
    randomize(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "both", combination_type="svd", svd_rank=8)
    for layer in (model.model.embed_tokens, model.model.layers[1].self_attn.q_proj):
        expected = layer.delta_weight("default") + 2 * layer.delta_weight("other")
        torch.testing.assert_close(layer.delta_weight("both"), expected, rtol=1e-4, atol=1e-5)


def test_unlike_ranks_in_one_adapter_are_kept_and_saved(tmp_path: Path) -> None:
    model = minipeft.get_peft_model(tiny_llama(), minipeft.LoraConfig(**FIRST, rank_pattern={"q_proj": 6}))
    model.add_adapter("other", minipeft.LoraConfig(**FIRST, rank_pattern={"q_proj": 6}))
    randomize(model)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    assert model.model.layers[0].self_attn.v_proj.scaling["both"] == 1
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    model.set_adapter("both")
    for library in (minipeft, peft):
        again = library.PeftModel.from_pretrained(tiny_llama(), tmp_path / "both").eval()
        torch.testing.assert_close(again(some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-5)


def test_rslora_adapters_combine_to_the_sum_of_their_updates() -> None:
    model = two(minipeft)
    model.add_adapter("root", minipeft.LoraConfig(**FIRST, use_rslora=True))
    randomize(model)
    model.add_weighted_adapter(["root", "default"], [1.0, 1.0], "both", combination_type="cat")
    layer = model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.delta_weight("both"), layer.delta_weight("root") + layer.delta_weight("default"))


def test_the_new_adapter_is_frozen_and_not_active() -> None:
    model = two(minipeft)
    model.add_weighted_adapter(["other"], [2.0], "twice")
    assert model.active_adapter == "default"
    assert not any(p.requires_grad for n, p in model.named_parameters() if "twice" in n)
    layer = model.model.layers[0].mlp.down_proj
    torch.testing.assert_close(layer.delta_weight("twice"), 2 * layer.delta_weight("other"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_name": "other"}, "Adapter with name 'other' already exists"),
        ({"adapters": ["default", "nope"]}, "Adapter nope does not exist"),
        ({"weights": [1.0]}, "with a weight each"),
        ({"combination_type": "nope"}, "combination_type must be one of"),
        ({"combination_type": "ties"}, "'ties' needs density"),
        ({"combination_type": "ties", "density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "majority_sign_method must be"),
        ({"svd_clamp": 2}, "svd_clamp is a quantile"),
        ({"svd_rank": -1}, "svd_rank must be positive"),
        ({"combination_type": "linear", "adapters": ["default", "small"]}, "must have the same r"),
        ({"adapters": ["default", "dora"]}, "'dora' cannot be combined: DoRA"),
        ({"adapters": ["head", "head2"]}, "same module with modules_to_save: 'head', 'head2' train lm_head whole"),
        ({"adapters": ["default", "biases"]}, "'biases' cannot be combined: it trains .*bias"),
        ({"adapters": ["default", "prefix"]}, "'prefix' is no LoRA adapter"),
    ],
)
def test_what_cannot_be_combined_says_so(arguments: dict[str, Any], message: str) -> None:
    model = two(minipeft, tiny_llama(attention_bias=True))
    model.add_adapter("small", minipeft.LoraConfig(**{**FIRST, "r": 2}))
    model.add_adapter("dora", minipeft.LoraConfig(**FIRST, use_dora=True))
    model.add_adapter("biases", minipeft.LoraConfig(**FIRST, bias="lora_only"))
    for name in ("head", "head2"):
        model.add_adapter(name, minipeft.LoraConfig(**FIRST, modules_to_save=["lm_head"]))
    model.add_adapter("prefix", minipeft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    names = sorted(model.peft_config)
    given = {"adapters": ["default", "other"], "weights": WEIGHTS, "adapter_name": "both", **arguments}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**given)
    assert sorted(model.peft_config) == names


@pytest.mark.parametrize("kind", ["cat", "linear", "svd", "ties"])
@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_are_the_base_s_and_the_combined_differences(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    base = model.model.embed_tokens.weight.detach().double()
    model = minipeft.get_peft_model(model, minipeft.LoraConfig(**FIRST, trainable_token_indices=[5, 2]))
    model.add_adapter("other", minipeft.LoraConfig(**SECOND, trainable_token_indices={"embed_tokens": [2, 7]}))
    randomize(model)
    rows = model.model.embed_tokens.trainable_tokens_delta
    first, second = rows["default"].detach().double(), rows["other"].detach().double()
    density = {"density": 1.0} if kind == "ties" else {}
    model.add_weighted_adapter(["default", "other"], [0.5, -1.5], "new", combination_type=kind, **density)
    assert model.peft_config["new"].trainable_token_indices == {"model.embed_tokens": [2, 5, 7]}
    of_2 = torch.stack([first[1] - base[2], second[0] - base[2]])
    weighted = torch.tensor([[0.5], [-1.5]], dtype=torch.float64) * of_2
    if kind == "ties":
        agrees = of_2.sign() == torch.where(of_2.sum(dim=0) >= 0, 1, -1)
        shared = (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    else:
        shared = weighted.sum(dim=0)
    changes = [shared, 0.5 * (first[0] - base[5]), -1.5 * (second[1] - base[7])]
    torch.testing.assert_close(rows["new"].double(), base[[2, 5, 7]] + torch.stack(changes), atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    model.set_adapter("new")
    again = peft.PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / "new")
    ids = torch.tensor([[2, 5, 7, 11]])
    torch.testing.assert_close(model(ids).logits, again(ids).logits, atol=1e-5, rtol=0)


def test_a_module_that_one_adapter_trains_whole_is_the_new_one_s(tmp_path: Path) -> None:
    model = two(minipeft, modules_to_save=["lm_head", "input_layernorm"])
    randomize(model)
    trained = model.lm_head.modules_to_save["other"].weight.detach().clone()
    norm = model.model.layers[1].input_layernorm.modules_to_save["other"].weight.detach().clone()
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "new")
    assert torch.equal(model.lm_head.modules_to_save["new"].weight, trained)
    assert model.lm_head.modules_to_save["new"].weight is not model.lm_head.modules_to_save["other"].weight
    model.set_adapter("new")
    assert torch.equal(model.model.layers[1].input_layernorm.weight, norm)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "new")
    torch.testing.assert_close(model(some_ids()).logits, again(some_ids()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("whole", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_what_is_tied_is_combined_once(whole: dict[str, Any]) -> None:
    tied = {**SECOND, **whole, "ensure_weight_tying": True}
    model = two(minipeft, tiny_llama(tie_word_embeddings=True), **tied)
    randomize(model)
    model.add_weighted_adapter(["other"], [1.0], "new", combination_type="svd")
    model.set_adapter("other")
    expected = model(some_ids()).logits
    model.set_adapter("new")
    torch.testing.assert_close(model(some_ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_kinds_arguments_and_defaults_are_peft_s() -> None:
    signature = inspect.signature(peft.tuners.lora.LoraModel.add_weighted_adapter)
    hints = typing.get_type_hints(peft.tuners.lora.LoraModel.add_weighted_adapter)
    assert set(KINDS) == set(typing.get_args(hints["combination_type"]))
    ours = inspect.signature(minipeft.PeftModel.add_weighted_adapter)
    for name, parameter in signature.parameters.items():
        assert ours.parameters[name].default == parameter.default, name

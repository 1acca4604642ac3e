"""`ensure_weight_tying`: one update, or one trained copy, of the input embedding and all that is tied to it."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import some_ids, tiny_llama

import minipeft
from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.utils.other import _get_module_names_tied_with_embedding

IDS = some_ids()
WAYS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": r".*(embed_tokens|lm_head)"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
]


def base() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def config(library: Any, way: dict[str, Any], **fields: Any) -> Any:
    fields = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "ensure_weight_tying": True, **fields}
    return library.LoraConfig(**way, **fields)


def adapted(way: dict[str, Any], **fields: Any) -> Any:
    model = get_peft_model(base(), config(minipeft, way, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(IDS).logits
    return out


@pytest.mark.parametrize("way", WAYS)
def test_files_are_read_by_peft_and_back(way: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(way)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    theirs = peft.get_peft_model(base(), config(peft, way))
    theirs.save_pretrained(tmp_path / "theirs")
    back = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), logits(theirs), rtol=1e-4, atol=1e-4)
    assert back.get_parameter("lm_head.weight") is back.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_sum_of_both_uses(way: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(way)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        model.eval()(IDS, labels=IDS).loss.backward()
    embedding, head = theirs.base_model.model.model.embed_tokens, theirs.base_model.model.lm_head
    if "modules_to_save" in way:
        own, wanted = ours.lm_head.modules_to_save["default"].weight, head.modules_to_save["default"].weight.grad
        assert own is ours.model.embed_tokens.modules_to_save["default"].weight
        torch.testing.assert_close(own.grad, wanted)
        return
    # PEFT has two parameters over one memory, each with a part of the gradient.
    for name, other in (("lora_embedding_A", head.lora_B), ("lora_embedding_B", head.lora_A)):
        grad = getattr(ours.model.embed_tokens, name)["default"].grad
        wanted = getattr(embedding, name)["default"].grad + other["default"].weight.grad.T
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_merging_keeps_one_weight_and_the_output(way: dict[str, Any]) -> None:
    model = adapted(way)
    out, plain, weight = logits(model), logits(base()), model.lm_head._parameters["weight"]
    assert not torch.allclose(out, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-4)
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"] is not weight
    model.unmerge_adapter()
    assert model.lm_head._parameters["weight"] is weight and torch.equal(logits(model), out)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), out, rtol=1e-4, atol=1e-4)
    assert type(merged.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_tied_to_itself(way: dict[str, Any], again: Any) -> None:
    model = adapted(way)
    out, twin = logits(model), again(model)
    assert torch.equal(logits(twin), out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), out)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_adapters_come_and_go(way: dict[str, Any]) -> None:
    model = adapted(way)
    first = logits(model)
    model.add_adapter("second", config(minipeft, way))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second)
    assert sum(p.requires_grad for p in model.parameters()) == len(
        {id(p) for n, p in model.named_parameters() if ".second" in n}
    )
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert torch.equal(logits(model.unload()), logits(base()))


def test_an_untied_adapter_beside_a_tied_one_merges_for_itself() -> None:
    model = adapted(WAYS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("own", config(minipeft, WAYS[0], ensure_weight_tying=False))
    model.base_model.set_adapter(["default", "own"])
    out = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), out, rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[3]])
def test_over_16_bits(way: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    ours = get_peft_model(base().to(dtype), config(minipeft, way))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base().to(dtype), tmp_path)
    torch.testing.assert_close(logits(ours).float(), logits(theirs).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("tied", "way", "fields", "words"),
    [
        (True, {"target_modules": ["q_proj", "lm_head"]}, {"ensure_weight_tying": False}, "is not set to True"),
        (
            True,
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"ensure_weight_tying": False},
            "not set to True",
        ),
        (True, {"target_modules": ["q_proj"]}, {}, "no tied modules are added in either"),
        (False, {"target_modules": ["q_proj", "lm_head"]}, {}, "no tied modules were found in the model"),
    ],
)
def test_what_is_not_tied_is_said_as_by_peft(
    tied: bool, way: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    for library in (peft, minipeft):
        with pytest.warns(UserWarning, match=words):
            library.get_peft_model(tiny_llama(tie_word_embeddings=tied), config(library, way, **fields))


@pytest.mark.parametrize("way", WAYS)
def test_without_memory_until_it_is_loaded(way: dict[str, Any]) -> None:
    model = adapted(way)
    state = {name: tensor.clone() for name, tensor in minipeft.get_peft_model_state_dict(model).items()}
    twin = base()
    minipeft.inject_adapter_in_model(config(minipeft, way), twin, low_cpu_mem_usage=True)
    own = [parameter for parameter in twin.parameters() if parameter.is_meta]
    assert own and {vars(parameter)["_in_memory_on"] for parameter in own} == {torch.device("cpu")}
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    minipeft.set_peft_model_state_dict(twin, state)
    assert torch.equal(logits(twin), logits(model))
    assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_lengths_of_dora_cannot_be_tied() -> None:
    with pytest.raises(ValueError, match=r"use_dora=True: model\.embed_tokens, lm_head"):
        get_peft_model(base(), config(minipeft, WAYS[0], use_dora=True))


def test_names_of_tied_modules() -> None:
    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
    assert _get_module_names_tied_with_embedding(model) == ["lm_head"]
    assert model._get_module_names_tied_with_embedding() == ["lm_head"]
    assert _get_module_names_tied_with_embedding(tiny_llama()) == []
    model.config.tie_word_embeddings = False
    assert _get_module_names_tied_with_embedding(model) == []


@pytest.mark.parametrize(
    ("key", "layers", "pattern", "expected"),
    [
        ("layers.1.layers.0.up_proj", [1], ["layers"], True),
        ("layers.1.layers.0.up_proj", [0], ["layers"], False),
        ("foo.whatever.1.baz", [1], "", True),
        ("foo.whatever.1.baz", [0], "", False),
    ],
)
def test_layers_are_counted_as_by_peft(key: str, layers: list[int], pattern: Any, expected: bool) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists as theirs

    from minipeft.tuners.tuners_utils import check_target_module_exists as ours

    fields = {"layers_to_transform": layers, "layers_pattern": pattern}
    name = key.rpartition(".")[2]
    assert ours(LoraConfig(target_modules=[name], **fields), key) is expected
    assert bool(theirs(peft.LoraConfig(target_modules=[name], **fields), key)) is expected

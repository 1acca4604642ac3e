"""Several LoRA adapters in one batch: each row gives what it gives alone, and what PEFT gives."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import minipeft
from minipeft import LoraConfig, NF4Config, get_peft_model, quantize_model

ROWS = ["other", "__base__", "default", "other"]


def three(model: Any, **changes: Any) -> Any:
    """`model` with the adapters "default" (active), "other" and "third"."""
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(model, LoraConfig(**config))
    model.add_adapter("other", LoraConfig(**{**config, "r": 2, "use_dora": not changes}))
    model.add_adapter("third", LoraConfig(**config))
    randomize(model, scale=0.2)
    return model.eval()


def alone(model: Any, name: str, call: Any) -> Any:
    """What `call()` gives when the adapter called `name` acts, or none."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    before = model.active_adapters
    model.set_adapter(name)
    result = call()
    model.set_adapter(before)
    return result


@pytest.fixture(params=["llama", "nf4", "gpt2", "embedding"])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "llama":
        yield three(tiny_llama())
    elif request.param == "nf4":
        yield three(quantize_model(tiny_llama(), NF4Config()))
    elif request.param == "gpt2":
        yield three(tiny_gpt2(), target_modules=["c_attn"])
    else:
        yield three(tiny_llama(), target_modules=["embed_tokens", "down_proj", "lm_head"])


@torch.no_grad()
def test_each_row_gives_what_it_gives_alone(model: Any) -> None:
    ids = some_ids(4)
    mixed = model(ids, adapter_names=ROWS).logits
    for row, name in enumerate(ROWS):
        expected = alone(model, name, lambda row=row: model(ids[row : row + 1]).logits)
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=0, atol=2e-5)
    # And the call leaves nothing behind.
    torch.testing.assert_close(model(ids).logits, alone(model, "default", lambda: model(ids).logits))


@torch.no_grad()
def test_rows_equal_peft_s(tmp_path: Path) -> None:
    ours = three(tiny_llama(), target_modules=["q_proj", "down_proj"])
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    theirs.load_adapter(tmp_path / "other", "other")
    ids = some_ids(4)
    expected = theirs.eval()(input_ids=ids, adapter_names=ROWS).logits
    torch.testing.assert_close(ours(input_ids=ids, adapter_names=ROWS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
    ],
)
@torch.no_grad()
def test_generate_gives_each_prompt_what_it_gives_alone(how: dict[str, Any]) -> None:
    model = three(tiny_llama())
    ids, each = some_ids(4), how.get("num_return_sequences", 1)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **how}
    mixed = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=ROWS, **arguments)
    seen = set()
    for row, name in enumerate(ROWS):
        one = ids[row : row + 1]
        expected = alone(
            model, name, lambda one=one: model.generate(one, attention_mask=torch.ones_like(one), **arguments)
        )
        assert torch.equal(mixed[row * each : (row + 1) * each], expected)
        seen.add(tuple(expected.flatten().tolist()))
    assert len(seen) == 4


@torch.no_grad()
def test_an_encoder_gets_each_row_once_and_its_decoder_each_beam() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = three(T5ForConditionalGeneration(config), target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    ids = some_ids(4) % 64
    arguments: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    mixed = model.generate(input_ids=ids, adapter_names=ROWS, **arguments)
    for row, name in enumerate(ROWS):
        one = ids[row : row + 1]
        expected = alone(model, name, lambda one=one: model.generate(input_ids=one, **arguments))
        assert torch.equal(mixed[row : row + 1], expected)


@torch.no_grad()
def test_disabling_gives_base_rows() -> None:
    model, ids = three(tiny_llama()), some_ids(4)
    with model.disable_adapter():
        assert torch.equal(model(ids, adapter_names=ROWS).logits, tiny_llama()(ids).logits)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@torch.no_grad()
def test_compiled_rows_equal_eager_ones() -> None:
    model, ids = three(tiny_llama(), target_modules=["q_proj"]), some_ids(4)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, adapter_names=ROWS).logits, model(ids, adapter_names=ROWS).logits)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_a_call_walks_over_no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walks = three(tiny_llama()), []
    walk = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda *a, **k: walks.append(a) or walk(*a, **k))
    model(some_ids(4))
    plain = len(walks)
    model(some_ids(4), adapter_names=ROWS)
    assert len(walks) == 2 * plain


def test_what_others_read_of_the_model_stays_as_it_was() -> None:
    model = three(tiny_llama())
    assert inspect.signature(model.forward) == inspect.signature(tiny_llama().forward)
    assert inspect.signature(model.generate) == inspect.signature(tiny_llama().generate)
    assert model.can_generate()
    tiny = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    classifier = get_peft_model(BertForSequenceClassification(tiny), LoraConfig(target_modules=["query"]))
    assert not hasattr(classifier, "generate") and not classifier.can_generate()
    assert isinstance(model, LlamaForCausalLM)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default"], "1 names, but an adapted layer got an input of 4 rows"),
        (["default"] * 5, "5 names, but an adapted layer got an input of 4 rows"),
        (["__base__"] * 3, "3 names"),
        (["default", "nope", "default", "default"], r"non-existing adapter\(s\): nope; there are"),
        ("default", "must be a list"),
        ([], "must be a list"),
        (
            ["prefix"] * 4,
            "'prefix' acts on the whole batch .PrefixTuningConfig.; adapters .* lora, .*bottleneck",
        ),
        (["biased"] * 4, "'biased' has bias"),
    ],
)
def test_wrong_names_are_errors(names: Any, message: str) -> None:
    model = three(tiny_llama())
    model.add_adapter("prefix", minipeft.PrefixTuningConfig(num_virtual_tokens=2))
    model.add_adapter("biased", LoraConfig(target_modules=["q_proj"], bias="all"))
    before = model(some_ids(4)).logits
    with pytest.raises(ValueError, match=message):
        model(some_ids(4), adapter_names=names)
    assert torch.equal(model(some_ids(4)).logits, before)


@pytest.mark.parametrize("four_bit", [False, True])
def test_merged_weights_and_training_are_errors(four_bit: bool) -> None:
    model = three(quantize_model(tiny_llama(), NF4Config()) if four_bit else tiny_llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters, please call `unmerge_adapter` first.* \['default'\]"):
        model(some_ids(4), adapter_names=ROWS)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(some_ids(4), adapter_names=ROWS)


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_one_layer_takes_rows_too(target: str) -> None:
    model = three(tiny_llama(), target_modules=[target])
    layer = next(module for name, module in model.named_modules() if name.endswith(target))
    x = some_ids(4) if target == "embed_tokens" else torch.randn(4, 3, 64)
    rows = layer(x, adapter_names=ROWS)
    for index, name in enumerate(ROWS):
        torch.testing.assert_close(rows[index], alone(model, name, lambda: layer(x))[index])
    assert torch.equal(layer(x, adapter_names=None), layer(x))
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        layer(x, adapter_names=["other"])
    assert model._switch.by_row is None

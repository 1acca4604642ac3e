"""Virtual tokens under flash and flex attention give what they give under sdpa.

flash-attn needs a GPU: transformers' part runs with a stand-in for its functions, written after its documentation.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention as flex
from flash_stand_in import use_flash
from tiny import randomize, some_ids, tiny_llama
from tiny_decoders import tiny_decoder
from tiny_encoders import BASES, tiny_encoder
from torch.nn.attention.flex_attention import flex_attention

from minipeft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

P = 3
EXACT = {"rtol": 0, "atol": 2e-5}
METHODS: dict[str, Any] = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
IDS = some_ids(3, 9).clamp(min=3)
LEFT = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]])
RIGHT = LEFT.flip(1)

every_method = pytest.mark.parametrize("method", METHODS)


def adapted(method: str, base: Any, **changes: Any) -> Any:
    model = get_peft_model(base, METHODS[method](**{"num_virtual_tokens": P, "task_type": "CAUSAL_LM", **changes}))
    randomize(model, scale=0.5)
    return model


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model.eval()(**{"input_ids": IDS, **inputs}).logits


@pytest.fixture(autouse=True)
def _no_compiling() -> Iterator[None]:
    """flex_attention and its masks as plain functions: compiling each takes many seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def use_flex(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:

    def eager(query: Any, key: Any, value: Any, training: bool = False, **kwargs: Any) -> Any:
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex, "compile_friendly_flex_attention", eager)
    model.set_attn_implementation("flex_attention")
    return model


KINDS = {"flash": use_flash, "flex": use_flex}
every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]


@every_kind
@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen3"])
def test_decoders_agree_with_sdpa(family: str, method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (family, kind) == ("gpt2", "flex"):
        family = "olmo2"  # transformers has no flex attention for GPT-2
    model = adapted(method, tiny_decoder(family))
    padded: list[dict[str, torch.Tensor]] = [{}, {"attention_mask": LEFT}, {"attention_mask": RIGHT}]
    expected = [logits(model, **inputs) for inputs in padded]
    KINDS[kind](model, monkeypatch)
    for inputs, logits_of_sdpa in zip(padded, expected, strict=True):
        seen = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
        torch.testing.assert_close(logits(model, **inputs)[seen], logits_of_sdpa[seen], **EXACT)


@every_kind
@every_method
def test_generation_agrees_with_sdpa(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(method, tiny_decoder("llama"))
    steps = {"input_ids": IDS, "attention_mask": LEFT, "do_sample": False, "max_new_tokens": 5}
    expected = model.generate(**steps, num_beams=2)
    KINDS[kind](model, monkeypatch)
    assert torch.equal(model.generate(**steps, num_beams=2), expected)


@every_method
def test_gradients_under_flash_are_those_under_sdpa(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(method, tiny_llama())
    # The first token of a padded row is said by padding, which sees nothing that is defined.
    scored = LEFT * torch.nn.functional.pad(LEFT, (1, 0))[:, :-1]

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(IDS, attention_mask=LEFT, labels=IDS.masked_fill(scored == 0, -100)).loss.backward()
        return next(p.grad.clone() for p in model.parameters() if p.requires_grad)

    expected = gradient()
    use_flash(model, monkeypatch)
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-6)


@every_kind
@pytest.mark.parametrize("base", ["bert", "bart"])  # T5's bias: no flash, and flex for one row alone
def test_encoders_and_encoder_decoders_agree_with_sdpa(base: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("prefix", tiny_encoder(base), task_type=BASES[base][0])
    inputs: dict[str, Any] = {"attention_mask": RIGHT}
    if base != "bert":
        inputs["decoder_input_ids"] = some_ids(3, 6, seed=5).clamp(min=3)
    if (base, kind) == ("bart", "flash"):
        # transformers' own flash path misreads padding of what a decoder attends to, with or without a prefix.
        del inputs["attention_mask"]
    expected = logits(model, **inputs)
    KINDS[kind](model, monkeypatch)
    torch.testing.assert_close(logits(model, **inputs), expected, **EXACT)


@every_method
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_under_flex_a_sliding_window_does_not_evict_the_virtual_tokens(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = adapted(method, tiny_decoder(family)), some_ids(2, 20)
    expected = logits(model, input_ids=ids)
    torch.testing.assert_close(logits(use_flex(model, monkeypatch), input_ids=ids), expected, **EXACT)


@every_method
def test_flex_masks_are_widened_once_a_call(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = use_flex(adapted(method, tiny_llama(num_hidden_layers=4)), monkeypatch)
    masks = sys.modules["minipeft.virtual.masks"]
    calls: list[int] = []
    plain = masks.create_block_mask

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(masks, "create_block_mask", counted)
    logits(model)
    assert len(calls) == 1


@every_method
def test_under_flash_windows_and_packed_documents_are_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = use_flash(adapted(method, tiny_decoder("mistral")), monkeypatch)
    with pytest.raises(ValueError, match="'flash_attention_2' would let the sliding window of 8 tokens pass"):
        logits(model)
    model = use_flash(adapted(method, tiny_decoder("qwen2")), monkeypatch)
    torch.testing.assert_close(logits(model, position_ids=torch.arange(9)[None]), logits(model), **EXACT)
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    with pytest.raises(ValueError, match="before each of several packed documents"):
        logits(model, **packed)
    with pytest.raises(ValueError, match="before each of several packed documents"):
        logits(model, cu_seq_lens_q=torch.tensor([0, 4, 9]))


@every_method
def test_unknown_implementations_are_refused_by_name(method: str) -> None:
    model = adapted(method, tiny_llama())
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"'paged\|sdpa' does not work with virtual tokens"):
        logits(model)

"""Text from a model: prompts in, continuations out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, TextStreamer

from minipeft.train.batches import pad_id_of
from minipeft.train.chats import end_of_turn
from minipeft.train.encoding import encode_prompt
from minipeft.train.models import eval_mode, model_position_limit, vocabulary_of

# With a lower temperature, logits divided by it can leave float32's range; long before that, the likeliest token is
# all but certain to be drawn.
LEAST_TEMPERATURE = 1e-6


def sampling_config(
    max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0
) -> GenerationConfig:
    """The rule by which the next token is chosen, as transformers takes it.

    Args:
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token; from 1e-6 on, tokens are drawn, the more evenly the higher it is.
        top_p: draw among the likeliest tokens that together have this probability.
        top_k: draw among this many likeliest tokens; 0 for no such limit.

    Raises:
        ValueError: a value out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or greater, got {max_new_tokens}")
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0, or {LEAST_TEMPERATURE} or greater, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or greater, got {top_k}")
    if temperature == 0:
        # transformers' own defaults: for values left out it takes the model's, and warns that they have no effect. A
        # model's penalty_alpha would turn these into contrastive search.
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "penalty_alpha": 0.0}
        return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, **plain)
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k
    )


def chat_prompt(tokenizer: Any, text: str, system: str | None = None) -> str:
    """`text` as a user's message in the tokenizer's chat template, up to where the assistant begins.

    Raises:
        ValueError: the tokenizer has no chat template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, which a system message needs")
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # Templates raise jinja2's TemplateError, or any error of the expressions in them.
        detail = " ".join(str(error).split())
        raise ValueError(f"the tokenizer's chat template refuses the messages: {detail}") from error


def prompt_ids(tokenizer: Any, text: str, *, raw: bool = False, system: str | None = None) -> list[int]:
    """Token ids of a prompt: in the chat template where the tokenizer has one, else as it is.

    Raises:
        ValueError: see `chat_prompt`; or a prompt without a token.
    """
    if not raw and (system is not None or getattr(tokenizer, "chat_template", None)):
        # The template writes the special tokens itself.
        text = chat_prompt(tokenizer, text, system)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        ids = encode_prompt(tokenizer, text)
    if not ids:
        raise ValueError("the prompt is empty: there is nothing to go on from")
    return ids


def check_fits(limit: int | None, ids: list[int], sampling: GenerationConfig, virtual: int = 0) -> None:
    """Refuse a prompt that together with what may follow is longer than the `limit` positions of a model.

    Args:
        ids: the prompt's tokens.
        virtual: how many of the positions virtual tokens take.

    Raises:
        ValueError: it is longer.
    """
    if limit is not None and len(ids) + sampling.max_new_tokens + virtual > limit:
        adapter = f", the adapter takes {virtual} virtual tokens" if virtual else ""
        raise ValueError(
            f"the prompt has {len(ids)} tokens and max_new_tokens is {sampling.max_new_tokens}{adapter}: together more "
            f"than the model's max_position_embeddings ({limit})"
        )


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which a text ends: the tokenizer's, the model's, and that of a turn in the chat template.

    A model's `generation_config` and the tokenizer that it was trained with may know different ones.
    """
    own = model.generation_config.eos_token_id
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    token = end_of_turn(tokenizer)
    if token is not None:
        found.append(tokenizer.convert_tokens_to_ids(token))
    return sorted({number for number in found if number is not None})


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: GenerationConfig, *, stream: bool = False
) -> list[str]:
    """Continue every prompt until the model ends it or `max_new_tokens` are written.

    Args:
        prompts: token ids, see `prompt_ids`; they are padded on the left and run together.
        sampling: see `sampling_config`.
        stream: also print the text as it comes; for one prompt only.

    Returns:
        The new texts, without the prompts and without special tokens.

    Raises:
        ValueError: see `check_fits`.
    """
    longest = max(prompts, key=len)
    check_fits(model_position_limit(model), longest, sampling)
    rows, pad_id = vocabulary_of(model), pad_id_of(tokenizer)
    pad_id = pad_id if rows is None or pad_id < rows else 0
    device = next(model.parameters()).device
    prompt_rows = [torch.tensor(ids) for ids in prompts]
    on_the_left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(prompt_rows, padding_value=pad_id, **on_the_left).to(device)
    attention_mask = pad_sequence([torch.ones_like(row) for row in prompt_rows], **on_the_left).to(device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    sampling = copy.deepcopy(sampling)
    sampling.pad_token_id = pad_id
    sampling.eos_token_id = end_ids(model, tokenizer) or None
    with eval_mode(model):
        output = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=sampling, streamer=streamer
        )
    return tokenizer.batch_decode(output[:, len(longest) :], skip_special_tokens=True)

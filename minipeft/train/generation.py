"""Text from a model: prompts in, continuations out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minipeft.train.batches import pad_id_of
from minipeft.train.encoding import encode_prompt
from minipeft.train.evaluation import eval_mode
from minipeft.train.positions import model_position_limit

# Below it, logits over the temperature can leave float32's range; long before, the likeliest token is all but certain.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token; from 1e-6 on, tokens are drawn, the more evenly the higher it is.
        top_p: draw among the likeliest tokens that together have this probability.
        top_k: draw among this many likeliest tokens; 0 for no such limit.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or greater, got {self.max_new_tokens}")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0, or {LEAST_TEMPERATURE} or greater, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 or greater, got {self.top_k}")

    def arguments(self) -> dict[str, Any]:
        """The same for transformers' `generate`."""
        if self.temperature == 0:
            # None: the model's own sampling defaults would only bring a warning here.
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


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
        # Templates raise jinja2's TemplateError, and whatever their expressions run into.
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


def check_fits(limit: int | None, ids: list[int], sampling: Sampling, virtual: int = 0) -> None:
    """Refuse a prompt that together with what may follow is longer than the `limit` positions of a model.

    Args:
        virtual: how many of the positions virtual tokens take.

    Raises:
        ValueError: it is.
    """
    if limit is not None and len(ids) + sampling.max_new_tokens + virtual > limit:
        adapter = f", the adapter takes {virtual} virtual tokens" if virtual else ""
        raise ValueError(
            f"the prompt has {len(ids)} tokens and max_new_tokens is {sampling.max_new_tokens}{adapter}: together more "
            f"than the model's max_position_embeddings ({limit})"
        )


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], sampling: Sampling, *, stream: bool = False
) -> list[str]:
    """Continue every prompt until the model ends it or `max_new_tokens` are written.

    Args:
        prompts: token ids, see `prompt_ids`; they are padded on the left and run together.
        stream: also print the text as it comes; for one prompt only.

    Returns:
        The new texts, without the prompts and without special tokens.

    Raises:
        ValueError: see `check_fits`.
    """
    longest = max(prompts, key=len)
    check_fits(model_position_limit(model), longest, sampling)
    pad_id = pad_id_of(tokenizer)
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad_id] * (len(longest) - len(ids)) + ids for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (len(longest) - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    streamer = None
    if stream:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with eval_mode(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad_id,
            streamer=streamer,
            **sampling.arguments(),
        )
    return tokenizer.batch_decode(output[:, len(longest) :], skip_special_tokens=True)

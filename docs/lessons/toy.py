"""A small language, and a small Llama that has learned it: what the lessons fine-tune. And `line`, to quote code.

A sentence is a rule's token and then eleven symbols, each of which follows from the one before by that rule: a
permutation of the 32 symbols. The model is trained on four rules in two seconds ("pre-training"). The new task that
the lessons teach it has no token of a rule: its sentences begin with one symbol more, and its rule is the third one
but for eight symbols, which have other successors.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SYMBOLS, RULES, LENGTH = 32, 4, 12
VOCABULARY = SYMBOLS + RULES
ADAMW = functools.partial(torch.optim.AdamW, fused=True)


def rules() -> Tensor:
    """(4 + 1, 32) int64: the symbol that follows each symbol, by rule; the last row is the new task's."""
    generator = torch.Generator().manual_seed(0)
    known = torch.stack([torch.randperm(SYMBOLS, generator=generator) for _ in range(RULES)])
    new = known[2].clone()
    new[:8] = known[2][:8].roll(1)
    return torch.cat([known, new[None]])


def sentences(number: int, seed: int, new: bool) -> Tensor:
    """(number, 12) int64: sentences of the new task, or of the four rules that the model was trained on."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(RULES, (number,), generator=generator)
    symbol = torch.randint(SYMBOLS, (number,), generator=generator)
    if new:
        chosen = torch.full_like(chosen, RULES)
    following = rules()
    tokens = [] if new else [SYMBOLS + chosen]
    while len(tokens) < LENGTH:
        tokens.append(symbol)
        symbol = following[chosen, symbol]
    return torch.stack(tokens, dim=1)


def labels_of(ids: Tensor) -> Tensor:
    """The ids, with -100 (not learned) where nothing decides the token: at the first symbol."""
    labels = ids.clone()
    labels[:, :2] = torch.where(ids[:, :1] >= SYMBOLS, -100, labels[:, :2])
    return labels


def train(
    model: Any, steps: int, lr: float, new: bool = True, seed: int = 1, optimizer: Callable[..., Any] = ADAMW
) -> list[float]:
    """Train what requires a gradient on `steps` batches of 32 sentences; the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    chosen = optimizer(parameters, lr=lr)
    losses = []
    model.train()
    for step in range(steps):
        ids = sentences(32, seed * 100_000 + step, new)
        loss = model(ids, labels=labels_of(ids)).loss
        loss.backward()
        chosen.step()
        chosen.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def measure(model: Any, new: bool = True) -> tuple[float, float]:
    """Loss, and share of right next symbols, on 200 sentences that no training has seen."""
    ids = sentences(200, 99, new)
    labels = labels_of(ids)[:, 1:]
    logits = model(ids).logits[:, :-1]
    learned = labels != -100
    right = logits.argmax(-1)[learned] == labels[learned]
    return torch.nn.functional.cross_entropy(logits[learned], labels[learned]).item(), right.float().mean().item()


@functools.cache
def _trained() -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM  # here, since lessons 8 and 9 need no model

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=VOCABULARY, attn_implementation="eager", **sizes, **heads)
    with torch.random.fork_rng():  # what a lesson draws next does not depend on whether the model was there already
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    train(model, steps=100, lr=1e-2, new=False, seed=2)
    return model


def pretrained() -> LlamaForCausalLM:
    """The small Llama that knows the four rules, a fresh copy with each call."""
    return copy.deepcopy(_trained())


def line(function: Any, words: str) -> str:
    """The line of a function's or class's source in which `words` stand: a lesson quotes code as it is now."""
    return next(text.strip() for text in inspect.getsource(function).splitlines() if words in text)

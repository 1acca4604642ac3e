"""The loss of a batch as a sum over tokens, so that batches of any size add up exactly.

A mean per micro-batch would weight a token by the length of its neighbours; sums divided once by the number
of tokens of the whole optimizer step give the gradient of the one big batch.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minipeft.train.batches import Batch
from minipeft.train.encoding import IGNORE
from minipeft.train.head_loss import at_least_float32, head_loss_sum, split_model


def token_loss_sum(model: Any, batch: Batch) -> Tensor:
    """Sum of -log p(label) over the batch's learned tokens; scalar, float32 (float64 for a float64 model)."""
    positions, labels = learned_positions(batch)
    split = split_model(model) if _keeps_logits(model) else None
    if split is not None:
        body, head = split
        hidden = body(**batch.inputs, use_cache=False)[0]
        return head_loss_sum(head, hidden[positions], labels)
    return F.cross_entropy(logits_at(model, batch.inputs, positions), labels, reduction="sum")


def learned_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where a learned label is predicted, (B, T) bool, and those labels row by row, (N,) int64."""
    following = batch.labels[:, 1:]
    learned = following != IGNORE
    # Position t predicts label t + 1: (B, T - 1) -> (B, T)
    return F.pad(learned, (0, 1)), following[learned]


def logits_at(model: Any, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
    """Logits (N, vocabulary) at the N true entries of `positions` (B, T), row by row, in at least float32.

    The cache is off: it is useless here, and with it transformers would let packed documents see each other.
    """
    if _keeps_logits(model):
        # The head then runs on these positions only: with short completions it is most of the cost.
        return at_least_float32(model(**inputs, use_cache=False, logits_to_keep=positions).logits)
    logits = model(**inputs, use_cache=False).logits
    # Virtual tokens put in front make more logits than there are inputs; the last T are the inputs' own.
    return at_least_float32(logits[:, -positions.shape[1] :][positions])


def _keeps_logits(model: Any) -> bool:
    """Whether the model takes a (B, T) mask of positions to compute logits for."""
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "num_virtual_tokens", None) for config in configs):
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass's autocast context for the setting `precision` ("none" or "bf16")."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

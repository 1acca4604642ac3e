"""What a comparison measures on a model, text by text, and the errors of the means.

Every text's loss is kept: a mean over few texts says little without its error, and the change from one model to
another is known far better than either loss, because both read the same texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from minipeft.train.batches import collate
from minipeft.train.encoding import Example
from minipeft.train.loss import learned_positions, logits_at
from minipeft.train.models import eval_mode


@dataclass(frozen=True)
class Losses:
    """Sum of -log p over the learned tokens of each text, in nats, and how many these are."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return math.fsum(self.sums) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(mean); infinity where that overflows."""
        return exp(self.mean)

    @property
    def standard_error(self) -> float:
        """Of the mean, see `ratio_error`."""
        return ratio_error(self.sums, self.tokens)


def exp(loss: float) -> float:
    """exp(loss), or infinity."""
    return math.exp(loss) if loss < 709 else math.inf


def ratio_error(sums: Sequence[float], tokens: Sequence[int]) -> float:
    """Standard error of sum(sums) / sum(tokens) over texts drawn at random; nan for one text.

    Texts are what is drawn, not tokens, whose losses depend on one another. The error of a ratio of two means is
    that of sums - ratio * tokens, to first order (Cochran, Sampling Techniques, section 2.11).
    """
    n = len(sums)
    if n < 2:
        return math.nan
    ratio = math.fsum(sums) / sum(tokens)
    rest = math.fsum((s - ratio * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    return math.sqrt(rest * n / (n - 1)) / sum(tokens)


def change(before: Losses, after: Losses) -> tuple[float, float]:
    """Mean loss after less before, in nats a token, and its standard error over the texts, which are the same.

    Raises:
        ValueError: they are not.
    """
    if before.tokens != after.tokens:
        raise ValueError("the losses are of different texts")
    differences = [a - b for a, b in zip(after.sums, before.sums, strict=True)]
    return math.fsum(differences) / sum(before.tokens), ratio_error(differences, before.tokens)


def share_error(right: Sequence[float]) -> float:
    """Standard error of the mean of `right`, each 0 or 1 (or a mean of such): sqrt(p (1 - p) / n) for 0 and 1."""
    mean = math.fsum(right) / len(right)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in right)) / len(right)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for one value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


@torch.no_grad()
def measure_losses(model: Any, examples: Sequence[Example], pad_id: int, batch_size: int) -> Losses:
    """The loss of every text, each in a row of its own."""
    device = next(model.parameters()).device
    sums, tokens = [0.0] * len(examples), [example.loss_tokens for example in examples]
    # Alike in length, so that little is padded.
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    with eval_mode(model):
        for at in range(0, len(order), batch_size):
            group = order[at : at + batch_size]
            batch = collate([examples[i] for i in group], pad_id).to(device)
            positions, labels = learned_positions(batch)
            logits = logits_at(model, batch.inputs, positions)
            losses = F.cross_entropy(logits, labels, reduction="none").double().cpu()
            for i, part in zip(group, losses.split([tokens[i] for i in group]), strict=True):
                sums[i] = part.sum().item()
    return Losses(sums, tokens)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, between neighbours in proportion."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])

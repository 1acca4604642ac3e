"""Packing several documents into one row, without contamination between them.

Isolation is transformers' own: given no attention mask, no cache, and position ids that restart at 0 for
every document, its models attend within a document only. Two ways to lose it in silence were measured with
transformers 5.23: `use_cache=True` in eval mode (every model), and models that ignore position ids when they
build the mask (OPT). So the loop always passes `use_cache=False`, and `check_isolation` tries the very model
before training.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from minipeft.train.errors import ConfigError


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into rows of `capacity`: best fit, longest first. Deterministic; every item exactly once.

    Returns:
        Rows of item indices.

    Raises:
        ValueError: an item is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    # (free tokens, row), sorted, so that the tightest row that fits is one bisection away.
    free: list[tuple[int, int]] = []
    for item in order:
        size = lengths[item]
        if size > capacity:
            raise ValueError(f"document {item} has {size} tokens, more than a row holds ({capacity})")
        at = bisect.bisect_left(free, (size, -1))
        if at == len(free):
            rows.append([item])
            bisect.insort(free, (capacity - size, len(rows) - 1))
        else:
            room, row = free.pop(at)
            rows[row].append(item)
            bisect.insort(free, (room - size, row))
    return rows


@torch.no_grad()
def check_isolation(model: Any, tolerance: float = 0.02) -> None:
    """Try on the model itself that packed documents do not see each other.

    Two rows differ only in their first document; the logits of the second must not differ. Dropout and other
    training-only behaviour are switched off for the test.

    Raises:
        ConfigError: they differ, so this model cannot train on packed rows.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(12, device=device) * 7 + 3) % vocabulary
    other = ids.clone()
    other[:6] = (other[:6] + 1) % vocabulary
    positions = torch.arange(6, device=device).repeat(2, 2)  # (2, 12): 0..5 0..5
    was_training = model.training
    model.eval()
    try:
        inputs = {"input_ids": torch.stack([ids, other]), "position_ids": positions, "use_cache": False}
        logits = model(**inputs).logits.float()[:, -6:]
    finally:
        model.train(was_training)
    spread = logits.std().item()
    leak = (logits[0] - logits[1]).abs().max().item()
    if not leak <= tolerance * spread:
        name = type(model).__name__
        raise ConfigError(f"packing: {name} lets packed documents see each other: set packing: false")

"""The loss of a training step, as users of transformers write it and as `minipeft train` computes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def as_user(model: Any, ids: Tensor) -> Tensor:
    """The mean loss as transformers' Trainer has it: the model's own."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def as_our_loop(model: Any, ids: Tensor) -> Tensor:
    """The mean loss as `minipeft train` has it."""
    # Here, so that a peer's process does not hold what it does not use.
    from minipeft.train.batches import Batch
    from minipeft.train.loss import token_loss_sum

    learned = ids.shape[0] * (ids.shape[1] - 1)
    return token_loss_sum(model, Batch({"input_ids": ids}, ids, ids.numel(), learned)) / learned

"""AdamW's arithmetic (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2).

    m <- beta1 m + (1 - beta1) g                       first moment
    v <- beta2 v + (1 - beta2) g^2                     second moment
    p <- (1 - lr weight_decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

These functions know nothing of pages: they take flat pieces of parameters, gradients and moments, of any lengths.
Whatever the parameter's dtype, the arithmetic is float32 and the parameter is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Hyper(NamedTuple):
    """What a parameter group asks for, as plain numbers; pieces with equal ones are updated together."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> Hyper:
        beta1, beta2 = map(float, group["betas"])
        lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
        return cls(lr, beta1, beta2, eps, weight_decay, bool(group["maximize"]))


@dataclass
class Pieces:
    """Flat pieces of tensors that are updated in one call.

    Attributes:
        params, grads: of equal lengths, pair by pair.
        states: for each pair the tensors of its state, as the layout of the pages orders them.
        steps: for each pair the number of the step, from 1.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Sequence[Tensor]]
    steps: list[int]

    @classmethod
    def none(cls) -> Pieces:
        return cls([], [], [], [])

    def add(self, param: Tensor, grad: Tensor, state: Sequence[Tensor], step: int) -> None:
        self.params.append(param)
        self.grads.append(grad)
        self.states.append(state)
        self.steps.append(step)


def update_32bit(pieces: Pieces, hyper: Hyper) -> None:
    """Update parameters and float32 moments, in place. State of a piece: (m, v), float32, of its length."""
    wide = [p if p.dtype == torch.float32 else p.float() for p in pieces.params]
    grads = [g if g.dtype == torch.float32 else g.float() for g in pieces.grads]
    exp_avgs, exp_avg_sqs = [state[0] for state in pieces.states], [state[1] for state in pieces.states]
    device = wide[0].device
    counts = {step: torch.tensor(float(step), device=device) for step in set(pieces.steps)}
    # One pass over memory where separate operations take ten; on CPU and on CUDA.
    torch._fused_adamw_(
        wide,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [counts[step] for step in pieces.steps],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        amsgrad=False,
        maximize=hyper.maximize,
        grad_scale=None,
        found_inf=None,
    )
    for p, copy in zip(pieces.params, wide, strict=True):
        if copy is not p:
            p.copy_(copy)

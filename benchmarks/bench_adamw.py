"""AdamW's update in place, 32-bit moments: the many small tensors of a LoRA, and one large tensor.

Bytes: parameter, both moments read and written, gradient read: 28 a parameter in float32. torch and bitsandbytes are
timed through their optimizers' `step()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Candidate, Case, Run, Work
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.reference import adamw_steps, near
from benchmarks.shapes import RANK, Sizes
from minipeft.kernels.adamw import adamw_

OP = "adamw"
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
BYTES_A_PARAMETER = 28
# Steps before the checked one, so that it starts from moments that are not zero.
STEPS_BEFORE = 2
# Three steps move a parameter by 3e-3; a thousandth of that, in units of the parameters' 0.02.
TOLERANCE = 1.5e-4


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """The adapters of some layers of Llama-2-7B, then one large parameter."""
    adapters = [shape for n, k in sizes.lora_layers for shape in ((RANK, k), (n, RANK))]
    for shapes in (adapters, [(sizes.big_parameter,)]):
        start = [0.02 * torch.randn(shape, device=device) for shape in shapes]
        grads = [[0.1 * torch.randn(shape, device=device) for shape in shapes] for _ in range(STEPS_BEFORE + 1)]
        yield _case(start, grads, peers)


def _case(start: list[Tensor], grads: list[list[Tensor]], peers: Peers) -> Case:
    numel = sum(p.numel() for p in start)
    work = Work(BYTES_A_PARAMETER * numel)
    check = (near(lambda: _right(start, grads)), TOLERANCE)
    candidates = [
        Candidate(OURS, partial(_ours, start, grads), *check, work),
        peers.candidate(BITSANDBYTES, lambda bnb: _optimizer(bnb.optim.AdamW32bit, start, grads), *check, work),
        Candidate("torch fused", lambda: _optimizer(torch.optim.AdamW, start, grads, fused=True), *check, work),
        Candidate("torch foreach", lambda: _optimizer(torch.optim.AdamW, start, grads, foreach=True), *check, work),
    ]
    shape = f"{len(start)} tensors, {numel / 1e6:.3g}M" if len(start) > 1 else f"1 tensor, {numel / 1e6:.3g}M"
    return Case(OP, "", shape, "float32", candidates)


def _right(start: list[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    by_parameter = zip(*grads, strict=True)
    return [adamw_steps(p, g, **HYPERPARAMETERS) for p, g in zip(start, by_parameter, strict=True)]


def _ours(start: list[Tensor], grads: list[list[Tensor]]) -> Run:
    params, m, v = ([p.clone() for p in start], *([torch.zeros_like(p) for p in start] for _ in range(2)))
    step = 0

    def run(gradient: Sequence[Tensor] = grads[-1]) -> list[Tensor]:
        nonlocal step
        step += 1
        adamw_(params, gradient, m, v, step=step, **HYPERPARAMETERS)
        return params

    for gradient in grads[:-1]:
        run(gradient)
    return run


def _optimizer(kind: Callable[..., Any], start: list[Tensor], grads: list[list[Tensor]], **options: bool) -> Run:
    params = [p.clone().requires_grad_() for p in start]
    optimizer = kind(params, **HYPERPARAMETERS, **options)
    for gradient in grads:
        for p, g in zip(params, gradient, strict=True):
            p.grad = g
        if gradient is not grads[-1]:
            optimizer.step()

    def run() -> list[Tensor]:
        optimizer.step()
        return params

    return run

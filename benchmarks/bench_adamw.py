"""AdamW's update in place, moments in 32 and in 8 bits: the many small tensors of a LoRA, and one large tensor.

Bytes: parameter, both moments read and written, gradient read: 28 a parameter in float32, 16.1 with 8 bits. torch and
bitsandbytes are timed through their optimizers' `step()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Candidate, Case, Run, Work
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.reference import adamw_steps, near
from benchmarks.shapes import RANK, Sizes
from minipeft.kernels import adamw_, adamw_8bit_
from minipeft_kernels.adamw.eight_bit import initial_state

OP = "adamw"
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
BYTES_A_PARAMETER = 28
# An 8-bit parameter: two bytes of state and two scales a block of 256, read and written.
BYTES_A_PARAMETER_8BIT = 12 + 2 * (2 + 8 / 256)
# Steps before the checked one, so that it starts from moments that are not zero.
STEPS_BEFORE = 2
# Three steps move a parameter by 3e-3; a thousandth of that, in units of the parameters' 0.02.
TOLERANCE = 1.5e-4
# From 8-bit moments the update differs from the exact one by about a percent, differently for each parameter: its root
# mean square counts, as a part of the movement's.
TOLERANCE_8BIT = 0.02


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """The adapters of some layers of Llama-2-7B, then one large parameter; moments in 32 and in 8 bits."""
    adapters = [shape for n, k in sizes.lora_layers for shape in ((RANK, k), (n, RANK))]
    for shapes in (adapters, [(sizes.big_parameter,)]):
        start = [0.02 * torch.randn(shape, device=device) for shape in shapes]
        grads = [[0.1 * torch.randn(shape, device=device) for shape in shapes] for _ in range(STEPS_BEFORE + 1)]
        yield _case(start, grads, peers)
        yield _case_8bit(start, grads, peers)


def _case(start: list[Tensor], grads: list[list[Tensor]], peers: Peers) -> Case:
    work = Work(BYTES_A_PARAMETER * _numel(start))
    check = (near(lambda: _right(start, grads)), TOLERANCE)
    candidates = [
        Candidate(OURS, partial(_ours, adamw_, _zeros, start, grads), *check, work),
        peers.candidate(BITSANDBYTES, lambda bnb: _optimizer(bnb.optim.AdamW32bit, start, grads), *check, work),
        Candidate("torch fused", lambda: _optimizer(torch.optim.AdamW, start, grads, fused=True), *check, work),
        Candidate("torch foreach", lambda: _optimizer(torch.optim.AdamW, start, grads, foreach=True), *check, work),
    ]
    return Case(OP, "32-bit", _shape(start), "float32", candidates)


def _case_8bit(start: list[Tensor], grads: list[list[Tensor]], peers: Peers) -> Case:
    work = Work(round(BYTES_A_PARAMETER_8BIT * _numel(start)))
    check = (_near_8bit(start, grads), TOLERANCE_8BIT)

    def bitsandbytes(bnb: Any) -> Run:
        # It leaves tensors of less than 4096 elements in 32 bits by default.
        return _optimizer(bnb.optim.AdamW8bit, start, grads, min_8bit_size=0)

    candidates = [
        Candidate(OURS, partial(_ours, adamw_8bit_, initial_state, start, grads), *check, work),
        peers.candidate(BITSANDBYTES, bitsandbytes, *check, work),
    ]
    return Case(OP, "8-bit", _shape(start), "float32", candidates)


def _numel(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _shape(start: list[Tensor]) -> str:
    return f"{len(start)} tensor{'s' * (len(start) > 1)}, {_numel(start) / 1e6:.3g}M"


def _right(start: list[Tensor], grads: list[list[Tensor]]) -> list[Tensor]:
    by_parameter = zip(*grads, strict=True)
    return [adamw_steps(p, g, **HYPERPARAMETERS) for p, g in zip(start, by_parameter, strict=True)]


def _near_8bit(start: list[Tensor], grads: list[list[Tensor]]) -> Callable[[list[Tensor]], float]:
    def error(result: list[Tensor]) -> float:
        right = _right(start, grads)
        wrong = sum(float((p.detach() - q).square().sum()) for p, q in zip(result, right, strict=True))
        moved = sum(float((p - q).square().sum()) for p, q in zip(start, right, strict=True))
        return math.sqrt(wrong / moved)

    return error


def _zeros(p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(p), torch.zeros_like(p)


def _ours(
    update: Callable[..., None],
    initial: Callable[[Tensor], tuple[Tensor, ...]],
    start: list[Tensor],
    grads: list[list[Tensor]],
) -> Run:
    params = [p.clone() for p in start]
    states = [list(kind) for kind in zip(*(initial(p) for p in params), strict=True)]
    step = 0

    def run(gradient: Sequence[Tensor] = grads[-1]) -> list[Tensor]:
        nonlocal step
        step += 1
        update(params, gradient, *states, step=step, **HYPERPARAMETERS)
        return params

    for gradient in grads[:-1]:
        run(gradient)
    return run


def _optimizer(kind: Callable[..., Any], start: list[Tensor], grads: list[list[Tensor]], **options: Any) -> Run:
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

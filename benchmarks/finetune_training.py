"""Training a whole model: a step's time, a run's peak memory, the optimizer alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune_models import (
    NO_WORK,
    OP,
    OVER_BNB,
    PEFT,
    Bench,
    run_python,
    shape_title,
    step_error,
    stepper,
    token_ids,
)
from benchmarks.finetune_process import as_our_loop, as_user
from benchmarks.harness import OURS, Candidate, Case, Measured, Missing, Run, Work
from benchmarks.reference import adamw_steps, near
from benchmarks.shapes import dtype_name
from minipeft import PagedAdamW

PLAIN_LOOP = "minipeft, the model's own loss"
DENSE = "minipeft, dense LoRA"

# The largest right error of loss and gradients (see `step_error`). In bfloat16 activations are rounded 200 times on
# their way through the layers.
STEP_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.15}
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def step(bench: Bench, kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> Case:
    """A training step on a batch of `shape`, of the base "nf4" or "dense"."""
    models = bench.models

    def make(model: Callable[[], Any], loss: Callable[[Any, Tensor], Tensor]) -> Callable[[], Run]:
        def run() -> Run:
            loaded = model()
            return stepper(loaded, token_ids(shape, loaded.config.vocab_size, models.device), loss)

        return run

    error = step_error(lambda: models.right_step(dtype, shape))
    check = (error, STEP_TOLERANCES[dtype], _step_work(bench, shape, dtype))
    ours, theirs = (functools.partial(f, kind, dtype) for f in (models.ours, models.theirs))
    candidates: list[Candidate | Missing] = [
        Candidate(OURS, make(ours, as_our_loop), *check),
        Candidate(PLAIN_LOOP, make(ours, as_user), *check),
        bench.peer(OVER_BNB if kind == "nf4" else PEFT, make(theirs, as_user), *check),
    ]
    if kind == "nf4" and dtype == torch.float32:
        dense = functools.partial(models.ours, "dense", dtype)
        candidates.append(Candidate(DENSE, make(dense, as_our_loop), *check))
    title = "QLoRA step" if kind == "nf4" else "LoRA step"
    return Case(OP, title, shape_title(shape), dtype_name(dtype), candidates, rounds=bench.what.rounds)


def _step_work(bench: Bench, shape: tuple[int, int], dtype: torch.dtype) -> Work:
    model = bench.models.ours("nf4", dtype)
    trained, everything = model.get_nb_trainable_parameters()
    # The embedding is looked up, and multiplied with where it is the head, too.
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    frozen = everything - trained - (0 if tied else embedding)
    return Work(0, shape[0] * shape[1] * (4 * frozen + 6 * trained), dtype)


def memory(bench: Bench, shape: tuple[int, int]) -> Case:
    """Peak memory of a process that loads the base into NF4 and trains."""
    vocabulary = bench.models.ours("nf4", torch.float32).config.vocab_size
    ids = token_ids(shape, vocabulary, torch.device("cpu")).tolist()
    settings = {
        **{"base": str(bench.models.base.resolve()), "adapter": str(bench.models.adapter), "kind": "nf4"},
        **{"dtype": "float32", "device": str(bench.models.device), "ids": ids, "threads": torch.get_num_threads()},
    }
    right = functools.partial(bench.models.right_step, torch.float32, shape)

    def make(side: str, loop: bool) -> Callable[[], Run]:
        return lambda: functools.partial(_trained_in_process, {**settings, "side": side, "loop": loop})

    check = (lambda loss: abs(loss - right().loss) / right().loss, STEP_TOLERANCES[torch.float32], NO_WORK)
    candidates = [
        Candidate(OURS, make("minipeft", True), *check),
        *([] if bench.quick else [Candidate(PLAIN_LOOP, make("minipeft", False), *check)]),
        bench.peer(OVER_BNB, make("peft", False), *check),
    ]
    return Case(OP, "peak memory of QLoRA", shape_title(shape), "float32", candidates, unit="bytes", rounds=1)


def _trained_in_process(settings: dict[str, Any]) -> Measured:
    printed = json.loads(run_python("-m", "benchmarks.finetune_process", json.dumps(settings)).splitlines()[-1])
    return Measured(float(printed["peak"]), printed["loss"])


def optimizer(bench: Bench) -> Case:
    """An AdamW step over the adapter's parameters."""
    model = bench.models.ours("nf4", torch.float32)
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    grads = [0.1 * torch.randn_like(p) for p in start]
    numel = sum(p.numel() for p in start)
    right = near(lambda: [adamw_steps(p, [g], **SETTINGS) for p, g in zip(start, grads, strict=True)])
    check = (right, 1e-4, Work(28 * numel))
    kinds: dict[str, Callable[..., Any]] = {
        OURS: PagedAdamW,
        "torch fused": functools.partial(torch.optim.AdamW, fused=True),
        "torch foreach": functools.partial(torch.optim.AdamW, foreach=True),
    }
    candidates = [
        Candidate(name, functools.partial(_optimizer, kind, start, grads), *check) for name, kind in kinds.items()
    ]
    return Case(OP, "AdamW step", f"{len(start)} tensors, {numel / 1e6:.3g}M", "float32", candidates)


def _optimizer(kind: Callable[..., Any], start: list[Tensor], grads: list[Tensor]) -> Run:
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = kind(params, **SETTINGS)
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    def run() -> list[Tensor]:
        optimizer.step()
        return params

    return run

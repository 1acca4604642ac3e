"""Generation by a whole model with an adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.finetune_bench import NO_WORK, OP, OVER_BNB, Bench
from benchmarks.finetune_models import choice_error, token_ids
from benchmarks.harness import OURS, Candidate, Case, Run
from benchmarks.shapes import dtype_name

# Of a generated token: how much lower its logit may be than the best, in deviations of the logits. bitsandbytes
# generates in bfloat16 on CPUs with such instructions, whatever dtype is asked for.
CHOICE_TOLERANCE = 0.1


def generation(bench: Bench, dtype: torch.dtype) -> Case:
    """Greedy generation over NF4 with the adapter, a batch of one."""
    models, what = bench.models, bench.what

    def make(model: Callable[..., Any]) -> Callable[[], Run]:
        def run() -> Run:
            loaded = model("nf4", dtype).eval()
            ids = token_ids((1, what.prompt), loaded.config.vocab_size, models.device)
            options = {"max_new_tokens": what.generated, "min_new_tokens": what.generated, "do_sample": False}
            return torch.no_grad()(functools.partial(loaded.generate, input_ids=ids, **options))

        return run

    check = (choice_error(models.reference_model(dtype), what.prompt), CHOICE_TOLERANCE, NO_WORK)
    candidates = [
        Candidate(OURS, make(models.ours), *check),
        bench.peer(OVER_BNB, make(models.theirs), *check),
    ]
    size = f"{what.generated} tokens after {what.prompt}"
    return Case(OP, "generate NF4", size, dtype_name(dtype), candidates, rounds=what.rounds)

"""A whole model: training steps, their memory, generation, the optimizer, loading adapters, importing.

Beside minipeft stand PEFT with bitsandbytes, and PEFT and minipeft over the same weights dense. All hold the same NF4
codes, or what they decode to, and the same adapter, rank 16 on all linear layers. A step's loss and its gradients are
compared with those in float64; a generated token with what the float64 model would have chosen; a loaded adapter with
its file. A step's operations: forward and input gradient of every product with a frozen weight, 4 a weight and token;
with an adapter's, 6; attention and the layers between are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.finetune_loading import first_load, importing, last_load
from benchmarks.finetune_models import NO_WORK, OP, OVER_BNB, Bench, Models, base_folder, choice_error, token_ids
from benchmarks.finetune_training import memory, optimizer, step
from benchmarks.harness import OURS, Candidate, Case, Run
from benchmarks.peers import Peers
from benchmarks.shapes import Sizes, dtype_name

# Of a generated token: how much lower its logit may be than the best, in deviations of the logits. bitsandbytes
# generates in bfloat16 on CPUs with such instructions, whatever dtype is asked for.
CHOICE_TOLERANCE = 0.1


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """The rows of the table in README.md, in its order."""
    bench = Bench(Models(base_folder(sizes), device), sizes.finetuning, peers)
    short, long = sizes.finetuning.batches
    yield step(bench, "nf4", torch.float32, short)
    yield step(bench, "nf4", torch.float32, long)
    yield step(bench, "nf4", torch.bfloat16, short)
    yield step(bench, "dense", torch.float32, short)
    yield step(bench, "dense", torch.float32, long)
    bench.forget()
    for shape in (short,) if bench.quick else (short, long):
        yield memory(bench, shape)
    for dtype in (torch.float32, torch.bfloat16):
        yield generation(bench, dtype)
        bench.forget()
    yield optimizer(bench)
    yield first_load(bench)
    yield last_load(bench)
    bench.forget()
    names = "LoraConfig, PeftModel, get_peft_model"
    yield from (importing(name) for name in ([""] if bench.quick else ["", names]))


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

"""A whole model: training steps, their memory, generation, the optimizer, loading adapters, importing.

Beside minipeft stand PEFT with bitsandbytes, and PEFT and minipeft over the same weights dense. All hold the same NF4
codes, or what they decode to, and the same adapter, rank 16 on all linear layers. A step's loss and its gradients are
compared with those in float64; a generated token with what the float64 model would have chosen; a loaded adapter with
its file. A step's operations: forward and input gradient of every product with a frozen weight, 4 a weight and token;
with an adapter's, 6; attention and the layers between are left out.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT
from benchmarks.finetune_loss import as_our_loop, as_user
from benchmarks.finetune_models import (
    PEFT,
    Models,
    choice_error,
    plain_name,
    step_error,
    stepper,
    token_ids,
)
from benchmarks.harness import OURS, Candidate, Case, Measured, Missing, Run, Work
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.peers import PEFT as PEFT_MODULE
from benchmarks.reference import adamw_steps, near
from benchmarks.shapes import Sizes, dtype_name
from minipeft import PagedAdamW, PeftModel
from minipeft.bench_command import HUGE_PAGES

OP = "finetune"
PLAIN_LOOP = "minipeft, the model's own loss"
DENSE = "minipeft, dense LoRA"
OVER_BNB = f"{PEFT} + {BITSANDBYTES}"

# The largest right error of loss and gradients (see `step_error`). In bfloat16 activations are rounded 200 times on
# their way through the layers.
STEP_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.15}
# Of a generated token: how much lower its logit may be than the best, in deviations of the logits. bitsandbytes
# generates in bfloat16 on CPUs with such instructions, whatever dtype is asked for.
CHOICE_TOLERANCE = 0.1
NO_WORK = Work(0)
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """The rows of the table in README.md, in its order."""
    models = Models(base_folder(sizes), device)
    bench = _Bench(models, sizes, peers)
    short, long = sizes.finetuning.batches
    yield bench.step("nf4", torch.float32, short)
    yield bench.step("nf4", torch.float32, long)
    yield bench.step("nf4", torch.bfloat16, short)
    yield bench.step("dense", torch.float32, short)
    yield bench.step("dense", torch.float32, long)
    bench.forget()
    for shape in (short,) if bench.quick else (short, long):
        yield bench.memory(shape)
    for dtype in (torch.float32, torch.bfloat16):
        yield bench.generation(dtype)
        bench.forget()
    yield bench.optimizer()
    yield bench.first_load()
    yield bench.last_load()
    bench.forget()
    names = "LoraConfig, PeftModel, get_peft_model"
    yield from (_importing(name) for name in ([""] if bench.quick else ["", names]))


def base_folder(sizes: Sizes) -> Path | None:
    """The model's folder: the one asked for, else the demo's; None for a tiny random model when quick."""
    if sizes.model is not None:
        return Path(sizes.model)
    if len(sizes.layers) == 1:
        return None
    from minipeft.training.smollm2 import smollm2_folder

    return smollm2_folder()


class _Bench:
    """What makes the cases: the models, each loaded when first needed."""

    def __init__(self, models: Models, sizes: Sizes, peers: Peers) -> None:
        self.models, self.what, self.peers = models, sizes.finetuning, peers
        self.quick = self.what.rounds == 1

    def forget(self) -> None:
        """Free the models that were loaded; the next case loads its own."""
        for cached in (Models.ours, Models.theirs, Models.right_step):
            cached.cache_clear()  # type: ignore[attr-defined]
        gc.collect()

    def _peer(self, name: str, run: Callable[[], Run], *check: Any) -> Candidate | Missing:
        for module in (PEFT_MODULE, *([BITSANDBYTES] if name == OVER_BNB else [])):
            found = self.peers.find(module)
            if isinstance(found, str):
                return Missing(name, found)
        return Candidate(name, run, *check)

    def step(self, kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> Case:
        """A training step on a batch of `shape`, of the base "nf4" or "dense"."""
        models = self.models

        def make(model: Callable[[], Any], loss: Callable[[Any, Tensor], Tensor]) -> Callable[[], Run]:
            def run() -> Run:
                loaded = model()
                return stepper(loaded, token_ids(shape, loaded.config.vocab_size, models.device), loss)

            return run

        error = step_error(lambda: models.right_step(dtype, shape))
        check = (error, STEP_TOLERANCES[dtype], self._step_work(shape, dtype))
        ours, theirs = (functools.partial(f, kind, dtype) for f in (models.ours, models.theirs))
        candidates: list[Candidate | Missing] = [
            Candidate(OURS, make(ours, as_our_loop), *check),
            Candidate(PLAIN_LOOP, make(ours, as_user), *check),
            self._peer(OVER_BNB if kind == "nf4" else PEFT, make(theirs, as_user), *check),
        ]
        if kind == "nf4" and dtype == torch.float32:
            dense = functools.partial(models.ours, "dense", dtype)
            candidates.append(Candidate(DENSE, make(dense, as_our_loop), *check))
        title = "QLoRA step" if kind == "nf4" else "LoRA step"
        return Case(OP, title, _size(shape), dtype_name(dtype), candidates, rounds=self.what.rounds)

    def _step_work(self, shape: tuple[int, int], dtype: torch.dtype) -> Work:
        model = self.models.ours("nf4", dtype)
        trained, everything = model.get_nb_trainable_parameters()
        # The embedding is looked up, and multiplied with where it is the head, too.
        embedding = model.get_input_embeddings().weight.numel()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        frozen = everything - trained - (0 if tied else embedding)
        return Work(0, shape[0] * shape[1] * (4 * frozen + 6 * trained), dtype)

    def memory(self, shape: tuple[int, int]) -> Case:
        """Peak memory of a process that loads the base into NF4 and trains."""
        vocabulary = self.models.ours("nf4", torch.float32).config.vocab_size
        ids = token_ids(shape, vocabulary, torch.device("cpu")).tolist()
        settings = {
            **{"base": str(self.models.base.resolve()), "adapter": str(self.models.adapter), "kind": "nf4"},
            **{"dtype": "float32", "device": str(self.models.device), "ids": ids, "threads": torch.get_num_threads()},
        }
        right = functools.partial(self.models.right_step, torch.float32, shape)

        def make(side: str, loop: bool) -> Callable[[], Run]:
            return lambda: functools.partial(_trained_in_process, {**settings, "side": side, "loop": loop})

        check = (lambda loss: abs(loss - right().loss) / right().loss, STEP_TOLERANCES[torch.float32], NO_WORK)
        candidates = [
            Candidate(OURS, make("minipeft", True), *check),
            *([] if self.quick else [Candidate(PLAIN_LOOP, make("minipeft", False), *check)]),
            self._peer(OVER_BNB, make("peft", False), *check),
        ]
        return Case(OP, "peak memory of QLoRA", _size(shape), "float32", candidates, unit="bytes", rounds=1)

    def generation(self, dtype: torch.dtype) -> Case:
        """Greedy generation over NF4 with the adapter, a batch of one."""
        models, what = self.models, self.what

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
            self._peer(OVER_BNB, make(models.theirs), *check),
        ]
        size = f"{what.generated} tokens after {what.prompt}"
        return Case(OP, "generate NF4", size, dtype_name(dtype), candidates, rounds=what.rounds)

    def optimizer(self) -> Case:
        """An AdamW step over the adapter's parameters."""
        model = self.models.ours("nf4", torch.float32)
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

    def first_load(self) -> Case:
        """An adapter into a model without one, and out again (which is not timed)."""
        models = self.models

        def ours() -> Run:
            model = models.ours("nf4", torch.float32).unload()

            def run() -> Measured:
                seconds, loaded = _timed(lambda: PeftModel.from_pretrained(model, models.adapter))
                held = _held(loaded, "default")
                loaded.unload()
                return Measured(seconds, held)

            return run

        def theirs() -> Run:
            import peft

            base = [models.theirs("nf4", torch.float32).unload()]

            def run() -> Measured:
                seconds, loaded = _timed(lambda: peft.PeftModel.from_pretrained(base[0], str(models.adapter)))
                held = _held(loaded, "default")
                base[0] = loaded.unload()
                return Measured(seconds, held)

            return run

        check = (_stored_error(models.adapter), 0.0, NO_WORK)
        candidates = [Candidate(OURS, ours, *check), self._peer(OVER_BNB, theirs, *check)]
        rounds = max(2, 2 * self.what.rounds)
        self.forget()
        return Case(OP, "load an adapter", "the first", "float32", candidates, rounds=rounds)

    def last_load(self) -> Case:
        """One more adapter beside many; and the second beside one, which it should cost no more than."""
        models, count = self.models, self.what.adapters

        def make(fresh: Callable[[], Any], others: int) -> Callable[[], Run]:
            def run() -> Run:
                model = fresh()
                for i in range(others):
                    model.load_adapter(str(models.adapter), f"other{i}")
                return functools.partial(_loaded_beside, model, str(models.adapter))

            return run

        def ours() -> Any:
            return Models.ours.__wrapped__(models, "nf4", torch.float32)  # type: ignore[attr-defined]

        theirs = functools.partial(models.theirs, "nf4", torch.float32)
        check = (_stored_error(models.adapter), 0.0, NO_WORK)
        candidates = [
            Candidate(OURS, make(ours, count - 2), *check),
            Candidate("minipeft, the second", make(ours, 0), *check),
            self._peer(OVER_BNB, make(theirs, count - 2), *check),
        ]
        self.forget()
        rounds = max(2, 2 * self.what.rounds)
        return Case(OP, "load an adapter", f"number {count}", "float32", candidates, rounds=rounds)


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _optimizer(kind: Callable[..., Any], start: list[Tensor], grads: list[Tensor]) -> Run:
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = kind(params, **SETTINGS)
    for p, g in zip(params, grads, strict=True):
        p.grad = g

    def run() -> list[Tensor]:
        optimizer.step()
        return params

    return run


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def _loaded_beside(model: Any, folder: str) -> Measured:
    seconds, _ = _timed(lambda: model.load_adapter(folder, "measured"))
    held = _held(model, "measured")
    model.delete_adapter("measured")
    return Measured(seconds, held)


def _held(model: Any, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter in a model, by their names without the adapter's."""
    own = ((n, p) for n, p in model.named_parameters() if f".{adapter}." in n)
    return {plain_name(n.replace(f".{adapter}.", ".default.")): p.detach() for n, p in own}


def _stored_error(folder: Path) -> Callable[[dict[str, Tensor]], float]:
    """0 if an adapter's tensors are those of its file, bit for bit; inf if not."""

    def error(held: dict[str, Tensor]) -> float:
        from safetensors.torch import load_file

        stored = {plain_name(n): t for n, t in load_file(folder / "adapter_model.safetensors").items()}
        same = stored.keys() == held.keys() and all(torch.equal(held[n].cpu(), t) for n, t in stored.items())
        return 0.0 if same else math.inf

    return error


def _python(*words: str) -> str:
    # The allocator's large pages would be counted as used.
    environment = {k: v for k, v in os.environ.items() if k != HUGE_PAGES}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:80]} failed: {done.stderr.strip()[-150:]}")
    return done.stdout


def _trained_in_process(settings: dict[str, Any]) -> Measured:
    printed = json.loads(_python("-m", "benchmarks.finetune_process", json.dumps(settings)).splitlines()[-1])
    return Measured(float(printed["peak"]), printed["loss"])


def _importing(names: str = "") -> Case:
    """A process that imports the package, and with `names` what a script takes from it: all of it is timed."""

    def make(package: str) -> Callable[[], Run]:
        code = f"from {package} import {names}" if names else f"import {package}"
        words = ("-W", "ignore", "-c", f"{code}; print('imported')")
        return lambda: lambda: Measured(*_timed(lambda: _python(*words)))

    check = (lambda printed: 0.0 if printed.endswith("imported\n") else math.inf, 0.0, NO_WORK)
    candidates = [Candidate(OURS, make("minipeft"), *check), Candidate(PEFT, make("peft"), *check)]
    return Case(OP, "import", names.replace(", ", " "), "", candidates, rounds=5)

"""The waits before anything is computed: loading an adapter, the first and one beside many; importing."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune_models import NO_WORK, OP, OVER_BNB, PEFT, Bench, Models, plain_name, run_python
from benchmarks.harness import OURS, Candidate, Case, Measured, Run
from minipeft import PeftModel


def first_load(bench: Bench) -> Case:
    """An adapter into a model without one, and out again (which is not timed)."""
    models = bench.models

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
    candidates = [Candidate(OURS, ours, *check), bench.peer(OVER_BNB, theirs, *check)]
    rounds = max(2, 2 * bench.what.rounds)
    bench.forget()
    return Case(OP, "load an adapter", "the first", "float32", candidates, rounds=rounds)


def last_load(bench: Bench) -> Case:
    """One more adapter beside many; and the second beside one, which it should cost no more than."""
    models, count = bench.models, bench.what.adapters

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
        bench.peer(OVER_BNB, make(theirs, count - 2), *check),
    ]
    bench.forget()
    rounds = max(2, 2 * bench.what.rounds)
    return Case(OP, "load an adapter", f"number {count}", "float32", candidates, rounds=rounds)


def importing(names: str = "") -> Case:
    """A process that imports the package, and with `names` what a script takes from it: all of it is timed."""

    def make(package: str) -> Callable[[], Run]:
        code = f"from {package} import {names}" if names else f"import {package}"
        words = ("-W", "ignore", "-c", f"{code}; print('imported')")
        return lambda: lambda: Measured(*_timed(lambda: run_python(*words)))

    check = (lambda printed: 0.0 if printed.endswith("imported\n") else math.inf, 0.0, NO_WORK)
    candidates = [Candidate(OURS, make("minipeft"), *check), Candidate(PEFT, make("peft"), *check)]
    return Case(OP, "import", names.replace(", ", " "), "", candidates, rounds=5)


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

"""How costs grow: a training step over tokens, rank and width; attaching, loading and switching over what is there.

Each family of cases differs in one number; after all of them the slope of log(time) over log(number) is fitted by least
squares. 1 is linear, 0 does not grow. Only minipeft is measured.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune_loss import as_our_loop
from benchmarks.finetune_models import Models, base_folder, load_base, lora_config, random_llama, token_ids
from benchmarks.harness import OURS, Candidate, Case, Measured, Row, Run, Work
from benchmarks.peers import Peers
from benchmarks.shapes import Sizes
from minipeft import PeftModel, get_peft_model, quantize_model

OP = "finetune_growth"
DTYPE = torch.float32
HIDDEN = 64


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """All families, one after the other."""
    what = sizes.finetuning
    models = Models(base_folder(sizes), device)
    rounds = min(3, what.rounds)

    def case(family: str, number: int, make: Callable[[], Run], error: Callable[[Any], float]) -> Case:
        gc.collect()
        return Case(OP, family, str(number), "float32", [Candidate(OURS, make, error, 0.0, Work(0))], rounds=rounds)

    base = load_base(models.quantized(DTYPE), DTYPE).to(device)
    model = get_peft_model(base, lora_config())
    for tokens in what.tokens:
        ids = token_ids((1, tokens), model.config.vocab_size, device)
        yield case("step over tokens", tokens, functools.partial(_step, model, ids), _finite)
    for rank in what.ranks:
        model = get_peft_model(model.unload(), lora_config(r=rank))
        ids = token_ids(what.batches[0], model.config.vocab_size, device)
        yield case("step over rank", rank, functools.partial(_step, model, ids), _finite)
    model = model.unload()
    yield from _loading(model, models.adapter, what.adapters, case)
    for width in what.widths:
        narrow = get_peft_model(quantize_model(random_llama(width, layers=4)).to(device), lora_config())
        ids = token_ids(what.batches[0], narrow.config.vocab_size, device)
        yield case("step over width", width, functools.partial(_step, narrow, ids), _finite)
    for layers in what.depths:
        deep = random_llama(HIDDEN, layers).to(device)
        yield case("attach over layers", layers, functools.partial(_attach, deep), _finite)
    for layers in what.depths:
        deep = get_peft_model(random_llama(HIDDEN, layers).to(device), lora_config())
        yield case("switch over layers", layers, functools.partial(_switch, deep), _finite)


def summary(rows: Sequence[Row]) -> dict[str, str]:
    """The slope of each family."""
    families: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.median:
            families.setdefault(row.variant, []).append((float(row.shape), row.median))
    return {
        f"slope of {name}": f"{slope(points):.2f} from {points[0][0]:g} to {points[-1][0]:g}, "
        f"{slope(points[-2:]):.2f} at the end"
        for name, points in families.items()
        if len(points) > 1
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through (log x, log y)."""
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def _finite(number: float) -> float:
    return 0.0 if math.isfinite(number) else math.inf


def _step(model: Any, ids: Tensor) -> Run:
    model.train()

    def run() -> float:
        loss = as_our_loop(model, ids)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return run


def _loading(
    model: Any, adapter: Path, count: int, case: Callable[[str, int, Callable[[], Run], Callable[[Any], float]], Case]
) -> Iterator[Case]:
    """The n-th adapter beside the others, for n = 2, 4, 8, ..., up to `count`."""
    model = PeftModel.from_pretrained(model, adapter)
    number = 2
    while number <= count:
        while len(model.peft_config) < number - 1:
            model.load_adapter(adapter, f"other{len(model.peft_config)}")
        yield case("load over adapters", number, functools.partial(_load, model, adapter), _finite)
        number *= 2


def _load(model: Any, adapter: Path) -> Run:
    def run() -> Measured:
        began = time.perf_counter()
        model.load_adapter(adapter, "measured")
        seconds = time.perf_counter() - began
        model.delete_adapter("measured")
        return Measured(seconds, seconds)

    return run


def _attach(model: Any) -> Run:
    def run() -> Measured:
        began = time.perf_counter()
        adapted = get_peft_model(model, lora_config(r=4))
        seconds = time.perf_counter() - began
        adapted.unload()
        return Measured(seconds, seconds)

    return run


def _switch(model: Any) -> Run:
    def run() -> float:
        model.set_adapter("default")
        return 0.0

    return run

"""Growth of costs: a training step over tokens, rank and width; adapters over their number, and over layers.

Each family of cases differs in one number; after all of them its slope is fitted (`growth.py`). Only minipeft is
measured, and beside a step over tokens the attention in it, which is torch's and grows with their square. A step is
forward and backward. Results are only looked at for being finite: `bench_finetune.py` compares them.
"""

from __future__ import annotations

import functools
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.finetune_models import Models, base_folder, load_base, lora_config, random_llama, token_ids
from benchmarks.finetune_process import as_our_loop
from benchmarks.growth import PART, plot, summary
from benchmarks.harness import OURS, Candidate, Case, Measured, Run, Work
from benchmarks.peers import Peers
from benchmarks.shapes import FineTuning, Sizes
from minipeft import PeftModel, get_peft_model, quantize_model

__all__ = ["cases", "plot", "summary"]

OP = "finetune_growth"
DTYPE = torch.float32
HIDDEN = 64
RANK_OVER_LAYERS = 4


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """All families, one after the other."""
    what = sizes.finetuning
    models = Models(base_folder(sizes), device)
    base = load_base(models.quantized(DTYPE), DTYPE).to(device)
    yield from _over_tokens_and_rank(base, what, device)
    yield from _over_adapters(base, models.adapter, what, device)
    del base
    yield from _over_width(what, device)
    with tempfile.TemporaryDirectory(prefix="minipeft-growth-") as folder:
        yield from _over_layers(what, device, Path(folder))


def _case(family: str, number: int, make: Callable[[], Run], rounds: int | None, *parts: Candidate) -> Case:
    gc.collect()
    return Case(OP, family, str(number), "float32", [_candidate(OURS, make), *parts], rounds=rounds)


def _candidate(name: str, make: Callable[[], Run]) -> Candidate:
    return Candidate(name, make, lambda number: 0.0 if math.isfinite(number) else math.inf, 0.0, Work(0))


def _over_tokens_and_rank(base: Any, what: FineTuning, device: torch.device) -> Iterator[Case]:
    rounds = min(3, what.rounds)
    model = get_peft_model(base, lora_config())
    for tokens in what.tokens:
        ids = token_ids((1, tokens), model.config.vocab_size, device)
        attention = _candidate(PART, functools.partial(_attention, model.config, tokens, device))
        yield _case("step over tokens", tokens, functools.partial(_step, model, ids), rounds, attention)
    for rank in what.ranks:
        model = get_peft_model(model.unload(), lora_config(r=rank))
        ids = token_ids(what.batches[0], model.config.vocab_size, device)
        yield _case("step over rank", rank, functools.partial(_step, model, ids), rounds)
    model.unload()


def _step(model: Any, ids: Tensor) -> Run:
    model.train()

    def run() -> float:
        loss = as_our_loop(model, ids)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return run


def _attention(config: Any, tokens: int, device: torch.device) -> Run:
    """Forward and backward of torch's attention in all layers of a model with this config, on one row of tokens."""
    heads, own = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    query, key, value = (torch.randn(1, n, tokens, size, device=device, requires_grad=True) for n in (heads, own, own))

    def run() -> float:
        for _ in range(config.num_hidden_layers):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != own)
            out.backward(torch.ones_like(out))
            query.grad = key.grad = value.grad = None
        return out[0, 0, 0, 0].item()

    return run


def _over_adapters(base: Any, adapter: Path, what: FineTuning, device: torch.device) -> Iterator[Case]:
    """Loading the n-th adapter beside the others, and a step with one of n acting: n = 2, 4, 8, ..."""
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    ids = token_ids(what.batches[0], model.config.vocab_size, device)
    number = 2
    while number <= what.adapters:
        while len(model.peft_config) < number - 1:
            model.load_adapter(adapter, f"other{len(model.peft_config)}")
        yield _case("load over adapters", number, functools.partial(_load, model, adapter), None)
        yield _case("step over adapters", number - 1, functools.partial(_step, model, ids), min(3, what.rounds))
        number *= 2
    model.unload()


def _over_width(what: FineTuning, device: torch.device) -> Iterator[Case]:
    for width in what.widths:
        narrow = get_peft_model(quantize_model(random_llama(width, layers=4)).to(device), lora_config())
        ids = token_ids(what.batches[0], narrow.config.vocab_size, device)
        yield _case("step over width", width, functools.partial(_step, narrow, ids), min(3, what.rounds))


def _over_layers(what: FineTuning, device: torch.device, folder: Path) -> Iterator[Case]:
    """Attaching, saving, loading and switching adapters over the number of layers, which none may grow faster than."""
    deep = {layers: random_llama(HIDDEN, layers).to(device) for layers in what.depths}
    doing: dict[str, Callable[[Any], Run]] = {
        "attach": _attach,
        "save": lambda model: _save(model, folder),
        "load": lambda model: _save_and_load(model, folder),
        "switch": _switch,
        "unload": _unload,
    }
    for name, make in doing.items():
        for layers, model in deep.items():
            yield _case(f"{name} over layers", layers, functools.partial(make, model), None)


def _adapted(model: Any) -> Any:
    return model if isinstance(model, PeftModel) else get_peft_model(model, lora_config(r=RANK_OVER_LAYERS))


def _timed(call: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> Run:
    """A run that times `call` and not `after`, which undoes it or gets ready for the next."""

    def run() -> Measured:
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
        after()
        return Measured(seconds, seconds)

    return run


def _attach(model: Any) -> Run:
    return _timed(lambda: _adapted(model), lambda: model.unload())


def _save(model: Any, folder: Path) -> Run:
    adapted = _adapted(model)
    return _timed(lambda: adapted.save_pretrained(folder))


def _save_and_load(model: Any, folder: Path) -> Run:
    _adapted(model).save_pretrained(folder)
    return _load(model, folder)


def _load(model: Any, adapter: Path) -> Run:
    return _timed(lambda: model.load_adapter(adapter, "measured"), lambda: model.delete_adapter("measured"))


def _switch(model: Any) -> Run:
    adapted = _adapted(model)
    return _timed(lambda: adapted.set_adapter("default"))


def _unload(model: Any) -> Run:
    _adapted(model)
    return _timed(lambda: model.unload(), lambda: _adapted(model))

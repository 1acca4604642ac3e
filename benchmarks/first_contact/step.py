"""A training step of a whole model in Llama-3-8B's shape: minipeft over NF4, PEFT over bitsandbytes, and dense.

The weights are random and everybody's are the same numbers: quantized once by minipeft, shared with bitsandbytes, and
decoded for the dense model.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune_models import replace_module
from benchmarks.first_contact.record import Contact
from benchmarks.harness import describe
from benchmarks.peers import BITSANDBYTES, Peers, bitsandbytes_linear
from minipeft import LoraConfig, get_peft_model
from minipeft.nf4 import NF4Config, NF4Linear, NF4Weight, quantize_model

SIZES: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BATCHES = ((1, 2048), (1, 256))
TOKENS = 24
RANK = 16
STEPS = 5


def base_model(contact: Contact) -> Any:
    """A Llama of random bfloat16 weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(TINY if contact.pretend else SIZES), dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(contact.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def quantized_weights(base: nn.Module) -> dict[str, NF4Weight]:
    """The packed weight of every linear layer but the head."""
    linears = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    return {name: NF4Weight.quantize(m.weight.detach(), 64, double_quant=True) for name, m in linears.items()}


def with_layers(contact: Contact, layer: Callable[[NF4Weight], nn.Module], packed: dict[str, NF4Weight]) -> Any:
    """The model with a layer of somebody's in the place of each linear one; the rest is the same numbers."""
    torch.manual_seed(0)
    model = base_model(contact)
    for name, weight in packed.items():
        replace_module(model, name, layer(weight))
    return model


def ours_of(contact: Contact, packed: dict[str, NF4Weight]) -> Any:
    """minipeft's adapters over its NF4 layers, quantized in place."""
    torch.manual_seed(0)
    model = base_model(contact)
    quantize_model(model, NF4Config(compute_dtype=torch.bfloat16))
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == len(packed)
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))


def dense_of(contact: Contact, packed: dict[str, NF4Weight]) -> Any:
    """minipeft's adapters over bfloat16 weights, the numbers that the packed ones stand for."""
    torch.manual_seed(0)
    model = base_model(contact)
    with torch.no_grad():
        for name, weight in packed.items():
            model.get_submodule(name).weight.copy_(weight.dequantize(torch.bfloat16))
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))


def theirs_of(contact: Contact, packed: dict[str, NF4Weight], bnb: Any) -> Any:
    """PEFT's adapters over bitsandbytes' layers."""
    import peft

    model = with_layers(contact, lambda w: bitsandbytes_linear(bnb, w, torch.bfloat16, train=True), packed)
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear"))


def run(contact: Contact) -> None:
    """A row for each model and batch: seconds, memory, and how far its loss and gradients are from the dense ones."""
    torch.manual_seed(0)
    packed = quantized_weights(base_model(contact))
    bnb = Peers(contact.device).find(BITSANDBYTES)
    makers: dict[str, Callable[[], Any]] = {"minipeft": lambda: ours_of(contact, packed)}
    if not isinstance(bnb, str):
        makers["PEFT + bitsandbytes"] = lambda: theirs_of(contact, packed, bnb)
    makers["minipeft, dense bf16"] = lambda: dense_of(contact, packed)
    models = {}
    for who, make in makers.items():
        try:
            models[who] = trainable(make())
        except Exception as error:
            contact.row(what="model", who=who, failed=describe(error))
    for batch in ((1, 16),) if contact.pretend else BATCHES:
        _batch(contact, models, batch)
    _generation(contact, models)
    _where_python_goes(contact, models)
    if not contact.pretend:
        _where_time_goes(contact, models)


def trainable(model: Any) -> tuple[Any, Any]:
    """The model in training mode with the same adapter numbers for everybody, and its optimizer at rate zero."""
    generator = torch.Generator().manual_seed(1)
    trained = [p for _, p in sorted(model.named_parameters(), key=lambda x: _plain(x[0])) if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model.train(), torch.optim.AdamW(trained, lr=0.0, fused=True)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")


def _batch(contact: Contact, models: dict[str, tuple[Any, Any]], batch: tuple[int, int]) -> None:
    vocabulary = (TINY if contact.pretend else SIZES)["vocab_size"]
    ids = torch.randint(0, vocabulary, batch, generator=torch.Generator().manual_seed(2)).to(contact.device)
    steps = {who: step_of(*pair, ids) for who, pair in models.items()}
    losses, grads, peaks, times = {}, {}, {}, {who: [] for who in steps}
    for who, (model, _) in models.items():
        if not contact.pretend:
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
        losses[who] = float(steps[who]())
        grads[who] = {_plain(n): p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
        peaks[who] = 0 if contact.pretend else torch.cuda.max_memory_allocated() - start
    for _ in range(1 if contact.pretend else STEPS + 1):
        for who, step in steps.items():
            times[who].append(seconds(contact, step))
    exact = grads.get("minipeft, dense bf16", {})
    for who, own in times.items():
        own = own[1:] or own
        facts = {"loss": losses[who], "gradients off": _off(grads[who], exact), "peak beyond models": peaks[who]}
        us = 1e6 * median(own)
        contact.row(what=f"step {batch[0]}x{batch[1]}, {who}", who=who, us=us, least=1e6 * min(own), **facts)


def step_of(model: Any, optimizer: Any, ids: Tensor) -> Callable[[], Tensor]:
    """Forward, backward, update."""

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def seconds(contact: Contact, call: Callable[[], Any]) -> float:
    """By the wall: what a user waits for."""
    contact.wait()
    start = time.perf_counter()
    call()
    contact.wait()
    return time.perf_counter() - start


def _off(grads: dict[str, Tensor], exact: dict[str, Tensor]) -> float | None:
    if not exact or grads.keys() != exact.keys():
        return None
    off = sum(float((g.double() - exact[n].double()).square().sum()) for n, g in grads.items())
    size = sum(float(g.double().square().sum()) for g in exact.values())
    return (off / size) ** 0.5


def _generation(contact: Contact, models: dict[str, tuple[Any, Any]]) -> None:
    """Microseconds a token of one row, with the adapter, by transformers' own loop: Python and all."""
    ids = torch.arange(8, device=contact.device)[None]
    times: dict[str, list[float]] = {who: [] for who in models}
    tokens = 2 if contact.pretend else TOKENS
    for _ in range(1 if contact.pretend else 3):
        for who, (model, _) in models.items():
            model.eval()
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            with torch.no_grad():
                generate = partial(model.generate, input_ids=ids, **options)
                times[who].append(seconds(contact, generate) / tokens)
            model.train()
    for who, own in times.items():
        contact.row(what=f"generate, a token, {who}", who=who, us=1e6 * min(own), all=[1e6 * t for t in own])


def _where_python_goes(contact: Contact, models: dict[str, tuple[Any, Any]]) -> None:
    """Python's functions by their own time, over a step that launches and does not wait: a text file for each model."""
    vocabulary, length = (TINY["vocab_size"], 16) if contact.pretend else (SIZES["vocab_size"], 256)
    ids = torch.randint(0, vocabulary, (1, length)).to(contact.device)
    for who in ("minipeft", "PEFT + bitsandbytes"):
        if who not in models:
            continue
        step = step_of(*models[who], ids)
        step()
        contact.wait()
        start = time.perf_counter()
        step()
        queued = time.perf_counter() - start
        contact.wait()
        profiler = cProfile.Profile()
        with torch.autograd.set_multithreading_enabled(False):
            profiler.runcall(step)
        contact.wait()
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(60)
        (contact.folder / f"python-{who.split()[0]}.txt").write_text(text.getvalue())
        contact.row(what=f"queueing a step of 1x{length}", who=who, us=1e6 * queued)


def _where_time_goes(contact: Contact, models: dict[str, tuple[Any, Any]]) -> None:
    """The kernels that take most of a step's time on the GPU, and the GPU's share of the wall's."""
    from torch.profiler import ProfilerActivity, profile

    for batch in ((1, 2048), (1, 256)):
        ids = torch.randint(0, SIZES["vocab_size"], batch).to(contact.device)
        for who in ("minipeft", "PEFT + bitsandbytes"):
            if who not in models:
                continue
            step = step_of(*models[who], ids)
            step()
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                step()
                torch.cuda.synchronize()
            kernels = sorted(found.key_averages(), key=lambda k: -k.self_device_time_total)
            top = [f"{k.key[:60]} x{k.count}: {k.self_device_time_total:.0f}" for k in kernels[:12]]
            total = sum(k.self_device_time_total for k in kernels)
            contact.row(what=f"kernels of {batch[0]}x{batch[1]}", who=who, gpu_us=total, top=top)

"""Microseconds of Python a call, the GPU held up meanwhile, so that nothing but the queueing is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_nf4_matmul import ours as nf4_layer
from benchmarks.first_contact.record import Contact
from benchmarks.harness import describe
from benchmarks.peers import BITSANDBYTES, Peers, bitsandbytes_linear
from minipeft import LoraConfig, get_peft_model
from minipeft.kernels import adamw_, nf4_matmul
from minipeft.nf4 import NF4Weight

# The GPU's queue takes about a thousand launches, then Python waits for it: fewer calls of what launches many.
CALLS = 200
HELD_UP = 600_000_000  # clock cycles, about 0.3 s
TENSORS = 448  # of the adapters of a Llama-3-8B: 32 layers, 7 projections, two factors


def run(contact: Contact) -> None:
    """A row for each call: ours, then the peers'."""
    shape = (128, 256) if contact.pretend else (4096, 4096)
    w = NF4Weight.quantize(torch.randn(shape, device=contact.device).bfloat16(), 64, double_quant=True)
    x = torch.randn(1, shape[1], device=contact.device).bfloat16()
    dense = torch.randn(shape, device=contact.device).bfloat16()
    with torch.no_grad():
        _row(contact, "nf4_matmul", lambda: nf4_matmul(x, w.packed()))
        ours = torch.nn.Sequential(nf4_layer(w))
        _row(contact, "NF4Linear", lambda: ours(x))
        _row(contact, "torch linear", lambda: torch.nn.functional.linear(x, dense))
        bnb = Peers(contact.device).find(BITSANDBYTES)
        if not isinstance(bnb, str):
            theirs = bitsandbytes_linear(bnb, w, torch.bfloat16, train=False)
            _row(contact, "bitsandbytes Linear4bit", lambda: theirs(x))
    model: Any = get_peft_model(torch.nn.Sequential(nf4_layer(w)), LoraConfig(r=16, target_modules=["0"]))
    _step(contact, "adapted layer", model, x)
    if not isinstance(bnb, str) and not contact.pretend:
        import peft

        base = torch.nn.Sequential(bitsandbytes_linear(bnb, w, torch.bfloat16, train=True))
        model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=["0"]))
        _step(contact, "PEFT's adapted layer", model, x)
    _optimizers(contact)


def _step(contact: Contact, who: str, model: Any, x: torch.Tensor) -> None:
    model = model.to(contact.device)
    leaf = x.clone().requires_grad_()
    _row(contact, f"{who}, forward", lambda: model(leaf), CALLS // 5)
    dy = torch.ones_like(model(leaf))
    _row(contact, f"{who}, forward and backward", lambda: model(leaf).backward(dy), CALLS // 8)


def _optimizers(contact: Contact) -> None:
    count = 4 if contact.pretend else TENSORS
    params = [torch.randn(16, 4096, device=contact.device) for _ in range(count)]
    grads = [torch.randn_like(p) for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    _row(contact, f"adamw_ of {count} tensors", lambda: adamw_(params, grads, *moments, step=2, lr=1e-3), 5)
    theirs = [p.clone().requires_grad_() for p in params]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(theirs, fused=True)
    _row(contact, f"torch's fused AdamW of {count} tensors", optimizer.step, 5)


def _row(contact: Contact, what: str, call: Callable[[], Any], calls: int = CALLS) -> None:
    """Best of three: other programs on the host only ever add."""
    calls = 2 if contact.pretend else calls
    try:
        rounds = 1 if contact.pretend else 3
        for _ in range(rounds):
            call()
        best = min(_queueing(contact, call, calls) for _ in range(rounds))
        contact.row(what=what, us=1e6 * best)
    # A peer that fails is a row.
    except Exception as error:
        contact.row(what=what, failed=describe(error))


def _queueing(contact: Contact, call: Callable[[], Any], calls: int) -> float:
    contact.wait()
    if not contact.pretend:
        torch.cuda._sleep(HELD_UP)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    contact.wait()
    return spent / calls

"""Is it right on this hardware: bits where bits are defined, float64 elsewhere, the same bits two hundred times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.first_contact.clock import poison
from benchmarks.first_contact.record import Contact
from benchmarks.harness import distance
from benchmarks.reference import TOLERANCES, decoded
from minipeft.kernels import adamw_, lora_matmul, nf4_dequantize, nf4_matmul, nf4_quantize
from minipeft.nf4 import NF4Weight
from minipeft_kernels.nf4.quantize import nf4_quantize_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPEATS = 200


def run(contact: Contact) -> None:
    """A row for each check, `right` true or false."""
    shapes, rows = ((128, 256),), (1, 9)
    if not contact.pretend:
        shapes, rows = ((4096, 4096), (100, 192)), (1, 8, 16, 33, 64, 65, 300)
    for dtype in DTYPES[: 1 if contact.pretend else 3]:
        _quantize(contact, dtype)
        for shape in shapes:
            w = NF4Weight.quantize(torch.randn(shape, device=contact.device) / 30, 64, double_quant=True)
            _decode(contact, w, dtype)
            for m in rows:
                _product(contact, w, m, dtype)
    _same_bits(contact)
    _adamw(contact)


@contextmanager
def _reference() -> Iterator[None]:
    before = os.environ.get("MINIPEFT_BACKEND")
    os.environ["MINIPEFT_BACKEND"] = "reference"
    try:
        yield
    finally:
        os.environ.pop("MINIPEFT_BACKEND") if before is None else os.environ.update(MINIPEFT_BACKEND=before)


def _quantize(contact: Contact, dtype: torch.dtype) -> None:
    w = (torch.randn(1 << (12 if contact.pretend else 20)) * 0.1).to(dtype)
    ours, right = nf4_quantize(w.to(contact.device), 64), nf4_quantize_reference(w, 64)
    same = all(torch.equal(a.cpu(), b) for a, b in zip(ours, right, strict=True))
    contact.row(what="quantize, bits", dtype=str(dtype), right=same)


def _decode(contact: Contact, w: NF4Weight, dtype: torch.dtype) -> None:
    poison()
    ours = nf4_dequantize(w.packed(), dtype).cpu()
    with _reference():
        right = nf4_dequantize(w.to("cpu").packed(), dtype)
    contact.row(what="decode, bits", shape=tuple(w.shape), dtype=str(dtype), right=torch.equal(ours, right))


def _product(contact: Contact, w: NF4Weight, m: int, dtype: torch.dtype) -> None:
    n, k = w.shape
    x = torch.randn(m, k, device=contact.device).to(dtype).requires_grad_()
    lora_A = (torch.randn(16, k, device=contact.device) / k**0.5).requires_grad_()
    lora_B = torch.randn(n, 16, device=contact.device).requires_grad_()
    bias = torch.randn(n, device=contact.device)
    dy = torch.randn(m, n, device=contact.device).to(dtype)
    leaves = (x, lora_A, lora_B)
    poison()
    y = lora_matmul(x, w.packed(), lora_A, lora_B, 0.5, bias)
    poison()
    ours = (y, *torch.autograd.grad(y, leaves, dy))
    x64, A64, B64 = (t.detach().double().requires_grad_() for t in leaves)
    y64 = x64 @ decoded(w).T + 0.5 * (x64 @ A64.T) @ B64.T + bias.double()
    right = (y64, *torch.autograd.grad(y64, (x64, A64, B64), dy.double()))
    errors = [distance(a, b.detach()) for a, b in zip(ours, right, strict=True)]
    facts: dict[str, Any] = dict(zip(("y", "dx", "dA", "dB"), errors, strict=True))
    worst = max(errors)
    contact.row(
        what="product", shape=(n, k), rows=m, dtype=str(dtype), right=worst <= TOLERANCES[dtype], error=worst, **facts
    )


def _same_bits(contact: Contact) -> None:
    """Programs that share a tile add up in a fixed order: a bit that moves is a race."""
    shape, times = ((128, 1024), 3) if contact.pretend else ((4096, 4096), REPEATS)
    w = NF4Weight.quantize(torch.randn(shape, device=contact.device), 64, double_quant=True)
    for m in (1, 16) if contact.pretend else (1, 16, 40, 64):
        x = torch.randn(m, shape[1], device=contact.device).bfloat16()
        first = nf4_matmul(x, w.packed())
        moved = 0
        for _ in range(times):
            poison()
            moved += not torch.equal(nf4_matmul(x, w.packed()), first)
        contact.row(what="same bits", rows=m, times=times, moved=moved, right=moved == 0)


def _adamw(contact: Contact) -> None:
    shapes = [(3,), (64, 33), (16, 4096), (2049,)][: 2 if contact.pretend else 4]
    params, grads = ([torch.randn(s) for s in shapes] for _ in range(2))
    ours = [p.to(contact.device, copy=True) for p in params]
    moments = [[torch.zeros_like(p) for p in ours] for _ in range(2)]
    theirs = [p.double().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in (1, 2, 3):
        adamw_(ours, [g.to(contact.device) for g in grads], *moments, step=step, lr=1e-2, weight_decay=0.1)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.double()
        optimizer.step()
    error = max(distance(p.cpu(), q.detach()) for p, q in zip(ours, theirs, strict=True))
    contact.row(what="AdamW, three steps", error=error, right=error < 1e-5)

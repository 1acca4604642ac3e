"""Products with an NF4 weight beside bitsandbytes', torch's in bfloat16 and torch's own in 4 bits, by graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.first_contact.clock import copies_for, on_stream, poison, timed
from benchmarks.first_contact.record import Contact
from benchmarks.harness import describe, distance
from benchmarks.peers import BITSANDBYTES, Peers, bitsandbytes_linear
from benchmarks.reference import TOLERANCES, decoded
from minipeft.kernels import nf4_dequantize, nf4_matmul
from minipeft.nf4 import NF4Weight

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
FORWARD_ROWS, GRAD_ROWS = (1, 8, 16, 64, 256, 2048), (1, 16, 64, 2048)
TINY = ((128, 256),), (1, 9), (1,)
INT4_ROWS = 16  # torch's product of 4-bit integers is made for few rows


@dataclass(frozen=True)
class Weights:
    """Copies of one random weight of (out, in) features: packed, decoded in bfloat16, exact in float64."""

    packed: list[NF4Weight]
    dense: list[Tensor]
    exact: Tensor


def weights_of(shape: tuple[int, int], device: str) -> Weights:
    """As many copies as exceed the cache."""
    first = NF4Weight.quantize((0.02 * torch.randn(shape, device=device)).bfloat16(), 64, double_quant=True)
    exact = decoded(first)
    packed = [first] + [_copy(first) for _ in range(copies_for(first.nbytes) - 1)]
    dense = [exact.to(torch.bfloat16) for _ in range(copies_for(2 * exact.numel()))]
    return Weights(packed, dense, exact)


def _copy(weight: NF4Weight) -> NF4Weight:
    return NF4Weight.from_state({key: t.clone() for key, t in weight.state().items()})


def run(contact: Contact) -> None:
    """Decoding, forward and input gradient at each size."""
    shapes, forward_rows, grad_rows = TINY if contact.pretend else (SHAPES, FORWARD_ROWS, GRAD_ROWS)
    bnb = Peers(contact.device).find(BITSANDBYTES)
    for shape in shapes:
        weights = weights_of(shape, contact.device)
        _dequantize(contact, shape, weights, bnb)
        for rows in forward_rows:
            _forward(contact, shape, rows, weights, bnb)
        for rows in grad_rows:
            _gradient(contact, shape, rows, weights, bnb)
        del weights
        if not contact.pretend:
            torch.cuda.empty_cache()


def _forward(contact: Contact, shape: tuple[int, int], rows: int, weights: Weights, bnb: Any) -> None:
    x = torch.randn(rows, shape[1], device=contact.device).bfloat16()
    calls: dict[str, list[Callable[[], Tensor]]] = {
        "minipeft": [_bind(nf4_matmul, x, w.packed()) for w in weights.packed],
        "torch bf16": [_bind(torch.nn.functional.linear, x, w) for w in weights.dense],
    }
    if not isinstance(bnb, str):
        layers = [bitsandbytes_linear(bnb, w, torch.bfloat16, train=False) for w in weights.packed]
        calls["bitsandbytes"] = [_bind(layer, x) for layer in layers]
    if rows <= INT4_ROWS and not contact.pretend:
        calls["torch int4"] = [_bind(torch._weight_int4pack_mm, x, *_int4(w)) for w in weights.dense]
    measure(contact, "forward", shape, rows, calls, x.double() @ weights.exact.T, weights.packed[0].nbytes)


def _gradient(contact: Contact, shape: tuple[int, int], rows: int, weights: Weights, bnb: Any) -> None:
    x = torch.randn(rows, shape[1], device=contact.device).bfloat16().requires_grad_()
    dy = torch.randn(rows, shape[0], device=contact.device).bfloat16()

    def backward(product: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
        with on_stream():
            y = product(x, *arguments)
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    calls: dict[str, list[Callable[[], Tensor]]] = {
        "minipeft": [backward(nf4_matmul, w.packed()) for w in weights.packed],
        "torch bf16": [backward(torch.nn.functional.linear, w) for w in weights.dense],
    }
    if not isinstance(bnb, str):
        layers = [bitsandbytes_linear(bnb, w, torch.bfloat16, train=True) for w in weights.packed]
        calls["bitsandbytes"] = [backward(layer) for layer in layers]
    measure(contact, "input gradient", shape, rows, calls, dy.double() @ weights.exact, weights.packed[0].nbytes)


def _dequantize(contact: Contact, shape: tuple[int, int], weights: Weights, bnb: Any) -> None:
    calls = {"minipeft": [_bind(nf4_dequantize, w.packed(), torch.bfloat16) for w in weights.packed]}
    if not isinstance(bnb, str):
        layers = [bitsandbytes_linear(bnb, w, torch.bfloat16, train=False) for w in weights.packed]
        decode = bnb.functional.dequantize_4bit
        calls["bitsandbytes"] = [_bind(decode, p.weight, p.weight.quant_state) for p in layers]
    nbytes = weights.packed[0].nbytes + 2 * weights.exact.numel()
    measure(contact, "dequantize", shape, 0, calls, weights.exact, nbytes)


def measure(
    contact: Contact,
    what: str,
    shape: tuple[int, int],
    rows: int,
    calls: dict[str, list[Callable[[], Tensor]]],
    exact: Tensor,
    nbytes: int,
    **facts: Any,
) -> dict[str, dict[str, Any]]:
    """Check the first call of each against `exact`, time those that are right, and write a row of each."""
    right, errors = {}, {}
    for name, own in calls.items():
        poison()
        try:
            with torch.no_grad() if what != "input gradient" else torch.enable_grad():
                errors[name] = distance(own[0](), exact)
        # A peer or a kernel that fails is a row, and the table goes on.
        except Exception as error:
            contact.row(what=what, shape=shape, rows=rows, who=name, failed=describe(error))
            continue
        # torch's 4-bit integers are another quantization: timed as what 4 bits can do, not as the same numbers.
        if errors[name] <= TOLERANCES[torch.bfloat16] or name == "torch int4":
            right[name] = own
    with torch.no_grad() if what != "input gradient" else torch.enable_grad():
        results = timed(right)
    for name, error in errors.items():
        found = results.get(name, {"failed": "wrong: not timed"})
        rate = {"gb_per_s": nbytes / found["us"] / 1e3} if "us" in found else {}
        contact.row(what=what, shape=shape, rows=rows, who=name, error=error, **found, **rate, **facts)
    return results


def _bind(call: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: call(*arguments)


def _int4(dense: Tensor) -> tuple[Tensor, int, Tensor]:
    """A weight as torch's 4-bit product takes it: groups of 64, random codes, for its time alone."""
    n, k = dense.shape
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=dense.device)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    return packed, 64, torch.randn(k // 64, n, 2, device=dense.device).bfloat16()

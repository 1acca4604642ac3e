"""LoRA of rank 16 on a mixture's experts, forward and backward: time, and peak memory beyond the model.

Ours over NF4 and, with dense weights, over the numbers that those decode to. Beside it PEFT with `target_parameters`
over the dense ones, in the case's dtype, and over weights packed by bitsandbytes' `replace_parameter_4bit`, which packs
a stack of experts as one matrix, so that its nested scales are others. Routing is by chance, the same for all.
Operations: 6 a weight and token in forward and backward for an adapter's, 4 for the base's; bytes: the weights of
the experts that were chosen, forward and backward, packed or dense, and the adapter's.
"""

from __future__ import annotations

import functools
import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experts_models import (
    ALPHA,
    DENSE,
    NF4,
    TARGETS,
    Batch,
    Holder,
    adapted_by_minipeft,
    adapted_by_peft,
    base_of,
    factors,
    fill_randomly,
)
from benchmarks.finetune_models import OVER_BNB, PEFT, run_python
from benchmarks.harness import OURS, Candidate, Case, Measured, Missing, Run, Work
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.peers import PEFT as PEFT_MODULE
from benchmarks.reference import decoded
from benchmarks.shapes import RANK, Mixture, Sizes, dtype_name

OP = "experts"
OURS_DENSE = "minipeft, dense"
# Of the largest error of y or of a gradient, its length over the right one's.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# bitsandbytes' nested scales are of the whole stack: its weights are other numbers, as near to the given ones.
OTHER_SCALES = 5e-2


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """For each mixture and dtype: a step at each number of tokens, then its memory."""
    for mixture in sizes.mixtures:
        layers = Layers(mixture, device)
        for dtype in sizes.expert_dtypes:
            for tokens in sizes.expert_tokens:
                yield _step(layers, tokens, dtype, peers, sizes.expert_rounds)
            layers.forget()
            for tokens in sizes.expert_tokens[-1 if sizes.expert_rounds == 1 else 0 :]:
                yield _memory(mixture, tokens, dtype, device, peers)


class Layers:
    """The experts of a mixture as each side holds them, made when first needed, of one packed weight."""

    def __init__(self, mixture: Mixture, device: torch.device) -> None:
        self.mixture, self.device = mixture, device
        self._made: dict[tuple[str, str, torch.dtype], nn.Module] = {}
        self._dense: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, side: str, kind: str, dtype: torch.dtype) -> nn.Module:
        """The adapted experts of "minipeft" or "peft", NF4 or DENSE."""
        key = side, kind, dtype
        if key not in self._made:
            if side == "minipeft" and kind == NF4:
                base = base_of(self.mixture, dtype, self.device, fill_randomly)
            else:
                base = base_of(self.mixture, dtype, self.device, self._fill(dtype, shared=kind == DENSE))
            self._made[key] = (adapted_by_minipeft if side == "minipeft" else adapted_by_peft)(base, kind)
        return self._made[key]

    def _fill(self, dtype: torch.dtype, shared: bool) -> Callable[[str, Tensor], object]:
        """Writes the packed weights, decoded, or lets all who hold them dense hold the same ones."""
        packed = self.packed(dtype)
        if not shared:
            return lambda name, w: w.copy_(packed.dense_experts(name))

        def share(name: str, w: Tensor) -> None:
            key = name, dtype
            if key not in self._dense:
                self._dense[key] = packed.dense_experts(name)
            w.data = self._dense[key]

        return share

    def packed(self, dtype: torch.dtype) -> Any:
        """Our module of the packed experts."""
        holder = next(m for m in self.get("minipeft", NF4, dtype).modules() if isinstance(m, Holder))
        return holder.experts

    def forget(self) -> None:
        """Free them."""
        self._made.clear()
        self._dense.clear()
        gc.collect()


def _step(layers: Layers, tokens: int, dtype: torch.dtype, peers: Peers, rounds: int) -> Case:
    mixture = layers.mixture
    batch = Batch(mixture, tokens, dtype, layers.device)
    right = functools.cache(lambda: _right(layers, batch, dtype))

    def make(side: str, kind: str) -> Callable[[], Run]:
        return lambda: functools.partial(batch.step, layers.get(side, kind, dtype))

    check = (lambda result: relative_error(result, right())), TOLERANCES[dtype]
    packed, dense = (_work(mixture, batch, dtype, kind) for kind in (NF4, DENSE))
    candidates = [
        Candidate(OURS, make("minipeft", NF4), *check, packed),
        Candidate(OURS_DENSE, make("minipeft", DENSE), *check, dense),
        _peer(peers, PEFT, Candidate(PEFT, make("peft", DENSE), *check, dense)),
        _peer(peers, OVER_BNB, Candidate(OVER_BNB, make("peft", NF4), check[0], OTHER_SCALES, packed)),
    ]
    return Case(OP, "LoRA step", f"{mixture.name} T={tokens}", dtype_name(dtype), candidates, rounds=rounds)


def relative_error(result: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The length of each part's error over the length of what is right, of the part where it is largest."""
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(result, right, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _memory(mixture: Mixture, tokens: int, dtype: torch.dtype, device: torch.device, peers: Peers) -> Case:
    settings = {
        **{"mixture": astuple(mixture), "tokens": tokens, "dtype": dtype_name(dtype), "device": str(device)},
        **{"threads": torch.get_num_threads()},
    }

    def make(side: str, kind: str) -> Callable[[], Run]:
        return lambda: functools.partial(_in_process, {**settings, "side": side, "kind": kind})

    check = (lambda norm: 0.0 if math.isfinite(norm) and norm > 0 else math.inf), 0.0, Work(0)
    candidates = [
        Candidate(OURS, make("minipeft", NF4), *check),
        Candidate(OURS_DENSE, make("minipeft", DENSE), *check),
        _peer(peers, PEFT, Candidate(PEFT, make("peft", DENSE), *check)),
        _peer(peers, OVER_BNB, Candidate(OVER_BNB, make("peft", NF4), *check)),
    ]
    title = "peak memory beyond the model"
    return Case(OP, title, f"{mixture.name} T={tokens}", dtype_name(dtype), candidates, unit="bytes", rounds=1)


def _in_process(settings: dict[str, Any]) -> Measured:
    printed = json.loads(run_python("-m", "benchmarks.experts_process", json.dumps(settings)).splitlines()[-1])
    return Measured(float(printed["beyond"]), printed["norm"])


def _peer(peers: Peers, name: str, candidate: Candidate) -> Candidate | Missing:
    for module in (PEFT_MODULE, *([BITSANDBYTES] if name == OVER_BNB else [])):
        found = peers.find(module)
        if isinstance(found, str):
            return Missing(name, found)
    return candidate


def _work(mixture: Mixture, batch: Batch, dtype: torch.dtype, kind: str) -> Work:
    one = 3 * mixture.hidden * mixture.intermediate
    adapter = RANK * (2 * mixture.hidden + 3 * mixture.intermediate)
    rows, chosen = batch.chosen.numel(), batch.chosen.unique().numel()
    bits = 4.127 if kind == NF4 else 8 * dtype.itemsize
    # The gradients of all experts' factors are written, zeros where nobody chose them.
    nbytes = int(2 * chosen * one * bits / 8) + 8 * chosen * adapter + 4 * mixture.experts * adapter
    return Work(nbytes, rows * (4 * one + 6 * adapter), dtype)


def _right(layers: Layers, batch: Batch, dtype: torch.dtype) -> list[Tensor]:
    """y and the gradients of x and of the factors in float64, an expert after the other, the weight merged."""
    mixture, packed = layers.mixture, layers.packed(dtype)
    order = factors(layers.get("minipeft", NF4, dtype))
    grads = [torch.zeros_like(p, dtype=torch.float64) for p in order]
    x, dy, weights = (t.detach().double() for t in (batch.x, batch.dy, batch.weights))
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    wide = 2 * mixture.intermediate
    # A (experts r, in) and B (out, r experts), of the first weight and the second: their places in `order`.
    shapes = [tuple(p.shape) for p in order]
    up_A, down_A = (_place(shapes, ("A", width), order) for width in (mixture.hidden, mixture.intermediate))
    up_B, down_B = (_place(shapes, ("B", width), order) for width in (wide, mixture.hidden))
    for e in range(mixture.experts):
        token, place = (batch.chosen == e).nonzero(as_tuple=True)
        if not token.numel():
            continue
        rows = x[token].requires_grad_()
        own = [order[i].detach().double()[_A(e)] for i in (up_A, down_A)]
        own += [order[i].detach().double()[:, e :: mixture.experts] for i in (up_B, down_B)]
        A1, A2, B1, B2 = leaves = [t.clone().requires_grad_() for t in own]
        up, down = (_matrix(packed, name, e) for name in TARGETS)
        gate, value = (rows @ (up + ALPHA / RANK * B1 @ A1).T).chunk(2, dim=-1)
        out = (nn.functional.silu(gate) * value) @ (down + ALPHA / RANK * B2 @ A2).T
        out = out * weights[token, place, None]
        y.index_add_(0, token, out.detach())
        drows, dA1, dA2, dB1, dB2 = torch.autograd.grad(out, [rows, *leaves], dy[token])
        dx.index_add_(0, token, drows)
        grads[up_A][_A(e)], grads[down_A][_A(e)] = dA1, dA2
        grads[up_B][:, e :: mixture.experts], grads[down_B][:, e :: mixture.experts] = dB1, dB2
    return [y, dx, *grads]


def _A(e: int) -> slice:
    return slice(e * RANK, (e + 1) * RANK)


def _place(shapes: list[tuple[int, ...]], wanted: tuple[str, int], order: list[nn.Parameter]) -> int:
    """A's come first in `order` and have their inputs last, B's have their outputs first."""
    kind, width = wanted
    places = (0, 1) if kind == "A" else (2, 3)
    return next(i for i in places if shapes[i][1 if kind == "A" else 0] == width)


def _matrix(packed: Any, name: str, e: int) -> Tensor:
    one = packed.packed_experts(name).expert(e)
    fields = SimpleNamespace(
        **one._asdict(), shape=torch.Size((one.rows, one.columns)), nested_quant_map=one.nested_map
    )
    matrix: Tensor = decoded(fields)  # type: ignore[arg-type]
    return matrix

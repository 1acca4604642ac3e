"""y = x W^T with W in NF4, doubly quantized: decoding (M = 1), forward, the input gradient dx = dy W, and both in turn.

Bytes: packed weight and x read, y written; the dense floor reads its 16- or 32-bit weight instead. Operations: 2 M N K.
The gradient is autograd's: alone of a graph that was recorded before, the same for all; in a step recorded anew, as in
training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import OURS, Candidate, Case, Missing, Run, Work
from benchmarks.peers import BITSANDBYTES, UNSLOTH, Peers, bitsandbytes_linear, bitsandbytes_state
from benchmarks.reference import TOLERANCES, decoded, near, packed_weight
from benchmarks.shapes import Layer, Sizes, dtype_name
from minipeft.nf4 import NF4Linear, NF4Weight

OP = "nf4_matmul"
DENSE = "torch dense"

Check = tuple[Callable[[Any], float], float]


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """For each layer, dtype and number of rows: one case forward, one backward, one both in turn."""
    for layer in sizes.layers:
        for dtype in sizes.dtypes:
            weight = packed_weight(layer, dtype, device)
            exact = decoded(weight)
            for m in sizes.rows:
                yield _forward(layer, weight, exact, m, peers)
                yield _input_gradient(layer, weight, exact, m, peers)
                yield _step(layer, weight, exact, m, peers)


def packed_work(weight: NF4Weight, m: int) -> Work:
    """Of the product with the packed weight, either way."""
    nbytes = weight.nbytes + m * sum(weight.shape) * weight.dtype.itemsize
    return Work(nbytes, 2 * m * weight.shape.numel(), weight.dtype)


def dense_work(weight: NF4Weight, m: int) -> Work:
    """Of the product with the same weight unpacked."""
    packed = packed_work(weight, m)
    nbytes = packed.nbytes - weight.nbytes + weight.shape.numel() * weight.dtype.itemsize
    return Work(nbytes, packed.flops, weight.dtype)


def _forward(layer: Layer, weight: NF4Weight, exact: Tensor, m: int, peers: Peers) -> Case:
    x = torch.randn(m, layer.in_features, device=exact.device).to(weight.dtype)
    check = (near(lambda: x.double() @ exact.T), TOLERANCES[weight.dtype])
    packed = packed_work(weight, m)
    candidates = [
        Candidate(OURS, lambda: _call(ours(weight).eval(), x), *check, packed),
        peers.candidate(BITSANDBYTES, partial(_bitsandbytes_forward, weight, x), *check, packed),
        _unsloth(peers, weight, lambda w: x @ w.T, check, packed),
        Candidate(DENSE, lambda: _call(dense(weight), x), *check, dense_work(weight, m)),
    ]
    return Case(OP, "decode" if m == 1 else "forward", f"{layer.label} M={m}", dtype_name(weight.dtype), candidates)


def _input_gradient(layer: Layer, weight: NF4Weight, exact: Tensor, m: int, peers: Peers) -> Case:
    x = torch.randn(m, layer.in_features, device=exact.device).to(weight.dtype).requires_grad_()
    dy = torch.randn(m, layer.out_features, device=exact.device).to(weight.dtype)
    check = (near(lambda: dy.double() @ exact), TOLERANCES[weight.dtype])
    packed = packed_work(weight, m)

    def bitsandbytes(bnb: Any) -> Run:
        return _gradient(bitsandbytes_linear(bnb, weight, weight.dtype, train=True), x, dy)

    candidates = [
        Candidate(OURS, lambda: _gradient(ours(weight), x, dy), *check, packed),
        peers.candidate(BITSANDBYTES, bitsandbytes, *check, packed),
        _unsloth(peers, weight, lambda w: dy @ w, check, packed),
        Candidate(DENSE, lambda: _gradient(dense(weight), x, dy), *check, dense_work(weight, m)),
    ]
    return Case(OP, "input gradient", f"{layer.label} M={m}", dtype_name(weight.dtype), candidates)


def _step(layer: Layer, weight: NF4Weight, exact: Tensor, m: int, peers: Peers) -> Case:
    x = torch.randn(m, layer.in_features, device=exact.device).to(weight.dtype).requires_grad_()
    dy = torch.randn(m, layer.out_features, device=exact.device).to(weight.dtype)
    check = (near(lambda: (x.detach().double() @ exact.T, dy.double() @ exact)), TOLERANCES[weight.dtype])
    packed, unpacked = twice(packed_work(weight, m)), twice(dense_work(weight, m))
    candidates = [
        Candidate(OURS, lambda: _both(ours(weight), x, dy), *check, packed),
        peers.candidate(
            BITSANDBYTES,
            lambda bnb: _both(bitsandbytes_linear(bnb, weight, weight.dtype, train=True), x, dy),
            *check,
            packed,
        ),
        _unsloth(peers, weight, lambda w: (x.detach() @ w.T, dy @ w), check, packed),
        Candidate(DENSE, lambda: _both(dense(weight), x, dy), *check, unpacked),
    ]
    return Case(OP, "forward + input gradient", f"{layer.label} M={m}", dtype_name(weight.dtype), candidates)


def twice(work: Work) -> Work:
    """Of the product and its gradient."""
    return Work(2 * work.nbytes, 2 * work.flops, work.dtype)


def ours(weight: NF4Weight) -> NF4Linear:
    """Our layer of a packed weight."""
    layer = NF4Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.set_weight(weight)
    return layer


def dense(weight: NF4Weight) -> nn.Linear:
    """torch's layer of the same weight, unpacked, in its dtype."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(decoded(weight).to(weight.dtype), requires_grad=False)
    return layer


def _call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def _gradient(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Run:
    y = layer(x)
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]


def _both(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        y = layer(x)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    return run


def _bitsandbytes_forward(weight: NF4Weight, x: Tensor, bnb: Any) -> Run:
    # In eval mode, on CPUs with bfloat16 instructions, it repacks the weight at the first call and multiplies in
    # bfloat16 whatever x is: fast for bfloat16, and not the asked product for others (errors of 1e-2). In training mode
    # it does not.
    return _call(bitsandbytes_linear(bnb, weight, weight.dtype, train=weight.dtype != torch.bfloat16), x)


def _unsloth(
    peers: Peers, weight: NF4Weight, product: Callable[[Tensor], Any], check: Check, work: Work
) -> Candidate | Missing:
    """unsloth's way: decode the weight, then torch's product."""

    def make(kernels: Any) -> Run:
        codes, state = bitsandbytes_state(peers.find(BITSANDBYTES), weight)

        def run() -> Any:
            with torch.no_grad():
                return product(kernels.fast_dequantize(codes, state))

        return run

    return peers.candidate(UNSLOTH, make, *check, work)

"""A QLoRA layer, y = x W^T + s (x A^T) B^T with W in NF4 and a rank-16 adapter in float32: forward, and dx, dA, dB.

Bytes: packed weight, A, B, x read, y written; backward also dA, dB written and dy read, dx for y. Operations:
2 M N K + 2 M r (N + K) forward, 2 M N K + 4 M r (N + K) backward. The peers have no such operation: beside them stands
what Hugging Face PEFT computes around their layer, x cast to float32, two products, a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_nf4_matmul import DENSE, dense, ours
from benchmarks.harness import OURS, Candidate, Case, Run, Work
from benchmarks.peers import BITSANDBYTES, Peers, bitsandbytes_linear
from benchmarks.reference import TOLERANCES, decoded, near, packed_weight
from benchmarks.shapes import RANK, Layer, Sizes, dtype_name
from minipeft.kernels import lora_matmul
from minipeft.nf4 import NF4Weight

OP = "lora_matmul"
SCALING = 2.0


class Inputs:
    """A layer's weight, its adapter, M rows and their gradient, and what is right for them."""

    def __init__(self, weight: NF4Weight, exact: Tensor, m: int) -> None:
        out_features, in_features = weight.shape
        device, dtype = exact.device, weight.dtype
        self.weight, self.exact, self.m = weight, exact, m
        self.lora_A = (torch.randn(RANK, in_features, device=device) / in_features**0.5).requires_grad_()
        self.lora_B = (0.02 * torch.randn(out_features, RANK, device=device)).requires_grad_()
        self.x = torch.randn(m, in_features, device=device).to(dtype).requires_grad_()
        self.dy = torch.randn(m, out_features, device=device).to(dtype)

    def _wide(self) -> tuple[Tensor, ...]:
        return tuple(t.detach().double() for t in (self.x, self.lora_A, self.lora_B, self.dy))

    def right_forward(self) -> Tensor:
        """y (M, out_features) in float64."""
        x, lora_A, lora_B, _ = self._wide()
        return x @ self.exact.T + SCALING * (x @ lora_A.T) @ lora_B.T

    def right_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dx (M, in_features), dA (r, in_features) and dB (out_features, r) in float64."""
        x, lora_A, lora_B, dy = self._wide()
        low = SCALING * dy @ lora_B
        return dy @ self.exact + low @ lora_A, low.T @ x, SCALING * dy.T @ (x @ lora_A.T)

    def work(self, backward: bool, packed: bool) -> Work:
        """The least bytes and operations of the forward or backward, with the weight packed or dense."""
        n, k = self.weight.shape
        item = self.weight.dtype.itemsize
        weight = self.weight.nbytes if packed else n * k * item
        adapter = RANK * (n + k) * self.lora_A.itemsize
        if not backward:
            flops = 2 * self.m * (n * k + RANK * (n + k))
            return Work(weight + adapter + self.m * (n + k) * item, flops, self.weight.dtype)
        flops = 2 * self.m * (n * k + 2 * RANK * (n + k))
        return Work(weight + 2 * adapter + self.m * (n + 2 * k) * item, flops, self.weight.dtype)


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """For each layer, dtype and number of rows: one case forward and one backward."""
    for layer in sizes.layers:
        for dtype in sizes.dtypes:
            weight = packed_weight(layer, dtype, device)
            exact = decoded(weight)
            for m in sizes.rows:
                inputs = Inputs(weight, exact, m)
                yield _case(layer, inputs, peers, backward=False)
                yield _case(layer, inputs, peers, backward=True)


def _case(layer: Layer, inputs: Inputs, peers: Peers, backward: bool) -> Case:
    prepare: Callable[[Callable[[Tensor], Tensor], Inputs], Run] = _gradients if backward else _forward
    weight = inputs.weight
    check = (near(inputs.right_gradients if backward else inputs.right_forward), TOLERANCES[weight.dtype])
    # As bench_nf4_matmul's: in eval mode all would be multiplied in bfloat16 on some CPUs.
    train = backward or weight.dtype != torch.bfloat16

    def bitsandbytes(bnb: Any) -> Run:
        return prepare(_as_peft(bitsandbytes_linear(bnb, weight, weight.dtype, train), inputs), inputs)

    packed = inputs.work(backward, packed=True)
    candidates = [
        Candidate(OURS, lambda: prepare(_fused(inputs), inputs), *check, packed),
        peers.candidate(BITSANDBYTES, bitsandbytes, *check, packed),
        Candidate(
            DENSE, lambda: prepare(_as_peft(dense(weight), inputs), inputs), *check, inputs.work(backward, packed=False)
        ),
    ]
    variant = "backward" if backward else "forward"
    return Case(OP, variant, f"{layer.label} r={RANK} M={inputs.m}", dtype_name(weight.dtype), candidates)


def _fused(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    layer = ours(inputs.weight)
    return lambda x: lora_matmul(x, layer.packed(), inputs.lora_A, inputs.lora_B, SCALING)


def _as_peft(base: Callable[[Tensor], Tensor], inputs: Inputs) -> Callable[[Tensor], Tensor]:
    lora_A, lora_B = inputs.lora_A, inputs.lora_B

    def layer(x: Tensor) -> Tensor:
        y = base(x)
        update = torch.nn.functional.linear(torch.nn.functional.linear(x.to(lora_A.dtype), lora_A), lora_B)
        return (y + update * SCALING).to(y.dtype)

    return layer


def _forward(layer: Callable[[Tensor], Tensor], inputs: Inputs) -> Run:
    x = inputs.x.detach()

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def _gradients(layer: Callable[[Tensor], Tensor], inputs: Inputs) -> Run:
    y = layer(inputs.x)
    wanted = (inputs.x, inputs.lora_A, inputs.lora_B)
    return lambda: torch.autograd.grad(y, wanted, inputs.dy, retain_graph=True)

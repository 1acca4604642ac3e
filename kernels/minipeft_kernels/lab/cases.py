"""Each shipped operation as a launch to be profiled: its arguments for a shape, and what its numbers are divided by.

The bytes are random, since no count depends on them: codes and scales are valid whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nf4.codebooks import NF4_LEVELS, dynamic_map
from ..packed import NF4

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
RANK = 16


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        run: launches it. elements: weights, or parameters, that it is over. flops: of the mathematics.
        least_bytes: that it must read and write, each once. note: what a reader must know, or "".
    """

    run: Callable[[], object]
    elements: int
    flops: int
    least_bytes: int
    note: str = ""


def case(operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """An operation by its name.

    Args:
        operation: one of OPERATIONS. shape: as OPERATIONS says. dtype: of activations, weights or parameters.

    Raises:
        ValueError: another operation, or a shape that does not fit it.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"there is no operation {operation!r} to profile: known are {', '.join(OPERATIONS)}")
    letters, make = OPERATIONS[operation]
    wanted = letters.split(",")
    required = sum("=" not in w for w in wanted)
    if not required <= len(shape) <= len(wanted) or any(n < 1 for n in shape):
        raise ValueError(f"--shape of {operation} is {letters}, each 1 or more, got {','.join(map(str, shape))}")
    return make(shape, dtype)


def _packed(n: int, k: int) -> NF4:
    blocks = -(-n * k // BLOCKSIZE)
    codes = torch.randint(0, 256, ((n * k + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    nested = torch.rand(-(-blocks // NESTED_BLOCKSIZE)) + 0.5
    return NF4(codes, absmax, NF4_LEVELS.clone(), nested, dynamic_map().clone(), torch.tensor(2.0), n, k, BLOCKSIZE)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _matmul(shape: tuple[int, ...], dtype: torch.dtype, grad: bool, rank: int = 0) -> Case:
    from ..linear import gpu

    m, n, k = shape[:3]
    depth, width = (n, k) if grad else (k, n)
    weight = _packed(n, k)
    rows = torch.randn(m, depth).to(dtype)
    up = torch.randn(*((rank, width) if grad else (width, rank)))
    update = (torch.randn(m, rank), up) if rank else None
    least = _bytes(*weight.tensors(), rows, *(update or ())) + m * width * rows.element_size()

    def run() -> Tensor:
        if grad:
            return gpu.input_gradient(rows, weight, update, dtype)
        return gpu.forward(rows, weight, None, update, dtype)

    return Case(
        run,
        n * k,
        2 * m * (n * k + rank * width),
        least,
        ""
        if gpu.is_fused(rows, weight)
        else "decoded by this launch, and then multiplied by the vendor's library, which is not counted",
    )


def _experts(shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> Case:
    from ..experts.stack import NF4Stack
    from ..linear.gpu import launch

    rows, experts, n, k = shape
    chosen, (depth, width) = min(rows, experts), (n, k) if grad else (k, n)
    one = _packed(n, k)
    each = zip(NF4._fields, one.tensors(), strict=False)
    own = {name: t if t is None or "map" in name else torch.stack([t.squeeze()] * experts) for name, t in each}
    stack = NF4Stack(**own, rows=n, columns=k, blocksize=BLOCKSIZE)  # type: ignore[arg-type]
    # As evenly as it goes; of few rows the first experts have one each.
    counts = torch.tensor([rows // experts + (e < rows % experts) for e in range(experts)])
    offsets = counts.cumsum(0).int()
    x = torch.randn(rows, depth).to(dtype)
    least = chosen * _bytes(*one.tensors()) + _bytes(x, offsets) + rows * width * x.element_size()
    run = lambda: launch(x, stack, None, None, grad, offsets)  # noqa: E731
    return Case(run, chosen * n * k, 2 * rows * n * k, least)


def _dequantize(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    from ..nf4.dequantize_triton import dequantize_into

    weight, out = _packed(*shape), torch.empty(*shape, dtype=dtype)
    run = lambda: dequantize_into(out, weight)  # noqa: E731
    return Case(run, out.numel(), out.numel(), _bytes(*weight.tensors(), out))


def _quantize(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    from ..nf4.quantize_triton import quantize_absmax_into, quantize_into

    w = torch.randn(*shape).to(dtype)
    codes = torch.empty((w.numel() + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.ones(-(-w.numel() // BLOCKSIZE))
    small = torch.empty(absmax.numel(), dtype=torch.uint8)
    nested = torch.empty(-(-absmax.numel() // NESTED_BLOCKSIZE))

    def run() -> None:
        quantize_into(w, codes, absmax, BLOCKSIZE)
        quantize_absmax_into(absmax, torch.tensor(1.0), small, nested)

    return Case(run, w.numel(), w.numel(), _bytes(w, codes, absmax, small, nested))


def _adamw(shape: tuple[int, ...], dtype: torch.dtype, eight_bits: bool) -> Case:
    from ..adamw.eight_bit import initial_state
    from ..adamw.reference import Hyper
    from ..adamw.triton import launch_adamw, launch_adamw_8bit

    p, g = torch.randn(shape[0]).to(dtype), torch.randn(shape[0]).to(dtype)
    hyper = Hyper(1e-3, 0.9, 0.999, 1e-8, 0.01, False)
    state: tuple[Tensor, ...] = initial_state(p) if eight_bits else (torch.zeros(shape), torch.zeros(shape))
    launch: Callable[..., None] = launch_adamw_8bit if eight_bits else launch_adamw
    tensors = [[t] for t in (p, g, *state)]
    return Case(lambda: launch(*tensors, 10, hyper), p.numel(), 11 * p.numel(), _bytes(g) + 2 * _bytes(p, *state))


OPERATIONS: dict[str, tuple[str, Callable[[tuple[int, ...], torch.dtype], Case]]] = {
    "nf4_matmul": ("M,N,K", lambda s, d: _matmul(s, d, grad=False)),
    "nf4_matmul_input_grad": ("M,N,K", lambda s, d: _matmul(s, d, grad=True)),
    "lora_matmul": (f"M,N,K,R={RANK}", lambda s, d: _matmul(s, d, grad=False, rank=(*s, RANK)[3])),
    "lora_matmul_input_grad": (f"M,N,K,R={RANK}", lambda s, d: _matmul(s, d, grad=True, rank=(*s, RANK)[3])),
    "experts": ("ROWS,EXPERTS,N,K", lambda s, d: _experts(s, d, grad=False)),
    "experts_input_grad": ("ROWS,EXPERTS,N,K", lambda s, d: _experts(s, d, grad=True)),
    "nf4_dequantize": ("N,K", _dequantize),
    "nf4_quantize": ("N,K", _quantize),
    "adamw": ("PARAMETERS", lambda s, d: _adamw(s, d, eight_bits=False)),
    "adamw_8bit": ("PARAMETERS", lambda s, d: _adamw(s, d, eight_bits=True)),
}
"""By name: what --shape is, and what makes the case."""

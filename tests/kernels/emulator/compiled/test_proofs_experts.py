"""Every tile of the grouped products, as compiled for two GPUs, equals float64 with all checks on.

What the interpreter cannot show is here: the sums over all threads by which a program finds its expert, programs that
return at once, and everything that `test_proofs_products.py` has.
"""

from typing import Any

import pytest
import torch
from nf4_weights import Weight
from proof_products import DTYPES, TARGETS, assert_is
from tolerances import TOLERANCES

from minipeft.kernels.emulator import EmulatedLaunch, emulate
from minipeft_kernels.experts.stack import NF4Stack
from minipeft_kernels.lab.catalogue import Kernel, matmul_kernels
from minipeft_kernels.linear.gpu import launch

# Rows of three experts for each height of a tile: more than one tile, none, part of one.
COUNTS = {8: [9, 0, 2], 16: [17, 0, 5], 32: [40, 0, 15], 64: [65, 0, 60], 128: [129, 0, 65]}
KERNELS = [
    pytest.param(target, dtype, kernel, id=f"{target} {kernel.name}")
    for target in TARGETS
    for dtype in DTYPES
    for kernel in matmul_kernels(int(target.removeprefix("sm_")), dtype, experts=3)
]


def prove(
    target: str, counts: list[int], sizes: tuple[int, int], dtype: torch.dtype, grad: bool, rank: int, **kind: Any
) -> EmulatedLaunch:
    """y or dx of a stack of (n, k) matrices, with two rows of nobody, equals float64 row by row."""
    each = [Weight(*sizes, **kind) for _ in counts]
    parts = list(zip(*(one.packed.tensors() for one in each), strict=True))
    codes, absmax, levels, nested, nested_map, offset = parts
    stack = NF4Stack(
        torch.stack([c.flatten() for c in codes]),
        torch.stack(absmax),
        levels[0],
        None if nested[0] is None else torch.stack(nested),
        nested_map[0],
        None if offset[0] is None else torch.stack(offset),
        *each[0].packed[6:],
    )
    depth, width = sizes if grad else sizes[::-1]
    total = sum(counts) + 2
    rows, low = torch.randn(total, depth).to(dtype), (torch.randn(total, rank) * 0.3).to(dtype).float()
    if grad:
        up = torch.randn(len(counts), rank, width)
    else:  # as a file has it: the experts alternate
        up = torch.randn(width, rank * len(counts)).unflatten(1, (rank, len(counts))).permute(2, 0, 1)
    up = (up * 0.3).to(dtype).float()
    offsets = torch.tensor(counts).cumsum(0).int()
    with emulate(target) as run:
        out = launch(rows, stack, None, (low, up) if rank else None, grad, offsets)
    right = torch.zeros(total, width, dtype=torch.float64)
    owners = [e for e, count in enumerate(counts) for _ in range(count)]
    for i, e in enumerate(owners):
        w, b = each[e].dense, up[e].double()
        row, small = rows[i].double(), low[i].double()
        right[i] = row @ w + small @ b if grad else w @ row + b @ small
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), right, **TOLERANCES[dtype])
    (launched,) = run.launches
    assert launched.constants["EXPERTS"] == 4
    return launched


@pytest.mark.parametrize(("target", "dtype", "kernel"), KERNELS)
def test_a_shipped_tile_on_a_ragged_shape(target: str, dtype: str, kernel: Kernel) -> None:
    sizes = (141, 128) if kernel.grad else (70, 320)
    assert_is(prove(target, COUNTS[kernel.rows], sizes, DTYPES[dtype], kernel.grad, rank=3), kernel)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grad", [False, True])
def test_one_token_of_a_file_that_is_not_doubly_quantized(target: str, grad: bool) -> None:
    """Whole tiles, programs that share them, and blocks larger than a step of the loop."""
    sizes = (1024, 128) if grad else (64, 1024)
    launched = prove(target, [0, 1, 1], sizes, torch.bfloat16, grad, 0, double=False, blocksize=128)
    assert launched.grid[1] > 1 and launched.constants["EVEN"]

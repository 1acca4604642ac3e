"""Every shipped product with a packed weight, as compiled for two GPUs, equals float64 with all checks on.

What the interpreter cannot show is here: the byte permutes and multiply-adds of the inline assembly, layouts, masks
after lowering, asynchronous copies with their waits, tensor-core fragments, the order of stores before a counter.
"""

import pytest
import torch
from nf4_weights import Weight
from proof_products import DTYPES, TARGETS, assert_is, prove

from minipeft_kernels.lab.catalogue import Kernel, matmul_kernels

KERNELS = [
    pytest.param(target, dtype, kernel, id=f"{target} {kernel.name}")
    for target in TARGETS
    for dtype in DTYPES
    for kernel in matmul_kernels(int(target.removeprefix("sm_")), dtype)
]


@pytest.mark.parametrize(("target", "dtype", "kernel"), KERNELS)
def test_a_shipped_tile_on_a_ragged_shape(target: str, dtype: str, kernel: Kernel) -> None:
    """Rows, columns and depth that no tile divides, a bias, and an update of odd rank."""
    m = max(1, kernel.rows - 3)
    weight = Weight(70, 320) if not kernel.grad else Weight(141, 128)
    assert_is(prove(target, m, weight, DTYPES[dtype], kernel.grad, bias=not kernel.grad, rank=3), kernel)


@pytest.mark.parametrize(("target", "dtype", "kernel"), [p for p in KERNELS if p.values[1] == "bf16"])
def test_a_shipped_tile_on_a_shape_that_it_divides(target: str, dtype: str, kernel: Kernel) -> None:
    """As for Llama's layers: whole tiles, aligned, no masks, and programs that share a tile."""
    deep = 1024 if kernel.rows < 64 else 2048
    weight = Weight(128, deep) if not kernel.grad else Weight(deep, 64)
    launch = prove(target, kernel.rows, weight, DTYPES[dtype], kernel.grad)
    assert_is(launch, kernel)
    assert launch.constants["EVEN"]
    if kernel.rows < 64:
        assert launch.grid[1] > 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("m", "blocksize"), [(5, 64), (12, 128), (20, 256), (40, 64)])
def test_scales_of_other_kinds(target: str, grad: bool, m: int, blocksize: int) -> None:
    """Not doubly quantized, and blocks larger than a chunk of the loop."""
    prove(target, m, Weight(65, 512, blocksize, double=blocksize == 256), torch.bfloat16, grad)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shared_tiles_give_the_same_bits_every_time(target: str, dtype: torch.dtype) -> None:
    """The last program to arrive adds the parts in one order, whatever order they come in."""
    weight = Weight(33, 1024)
    x = torch.randn(2, 1024).to(dtype)
    from minipeft.kernels.emulator import emulate
    from minipeft_kernels.linear.gpu import launch_forward

    with emulate(target, counts=False) as run:
        outs = [launch_forward(x, weight.packed) for _ in range(2)]
    assert run.launches[0].grid[1] > 1
    assert torch.equal(*outs)

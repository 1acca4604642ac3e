"""The emulator runs kernels of the kind that Triton's tutorials teach, and gives what torch gives in float64."""

import math
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from tutorial_kernels import (
    add_kernel,
    attention_kernel,
    dropout_kernel,
    histogram_kernel,
    layer_norm_kernel,
    layer_norm_weight_grad_kernel,
    matmul_kernel,
    scan_kernel,
    softmax_kernel,
    split_matmul_kernel,
)

from minipeft.kernels.emulator import emulate

TARGETS = ("sm_80", "sm_90")


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN: an element that a kernel leaves out fails."""
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [1, 1000, 1024])
def test_vector_add(target: str, n: int) -> None:
    x, y, out = torch.randn(n), torch.randn(n), unwritten(n)
    with emulate(target):
        add_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("columns", [7, 100, 781])
def test_softmax(target: str, columns: int) -> None:
    x, out = torch.randn(3, columns + 5) * 4, unwritten(3, columns)
    rows = x[:, :columns]
    with emulate(target):
        softmax_kernel[(3,)](rows, out, columns, rows.stride(0), BLOCK=triton.next_power_of_2(columns))
    torch.testing.assert_close(out, torch.softmax(rows.double(), 1).float(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_norm(target: str, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(3, 300) * 2 + 5).to(dtype), torch.randn(300), torch.randn(300)
    out = unwritten(3, 300)
    with emulate(target):
        layer_norm_kernel[(3,)](x, weight, bias, out, 300, 1e-5, BLOCK=128)
    expected = torch.nn.functional.layer_norm(x.double(), (300,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=2e-5)


def test_layer_norm_weight_gradient_under_a_lock() -> None:
    dy, normed, sums, lock = torch.randn(13, 100), torch.randn(13, 100), torch.zeros(100), torch.zeros(1).int()
    with emulate("sm_80"):
        layer_norm_weight_grad_kernel[(4,)](dy, normed, sums, lock, 13, 100, ROWS=4, BLOCK=128)
    torch.testing.assert_close(sums, (dy.double() * normed).sum(0).float(), rtol=1e-5, atol=1e-5)
    assert lock.item() == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, "tf32"], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 64), (45, 70, 100)])
def test_matmul(target: str, dtype: Any, shape: tuple[int, int, int]) -> None:
    tf32 = dtype == "tf32"
    kind = torch.float32 if tf32 else dtype
    m, n, k = shape
    a, b, out = torch.randn(m, k).to(kind), torch.randn(k, n).to(kind), unwritten(m, n)
    with emulate(target):
        grid = (triton.cdiv(m, 64) * triton.cdiv(n, 32),)
        matmul_kernel[grid](a, b, out, m, n, k, GROUP=2, BM=64, BN=32, BK=32, TF32=tf32, num_warps=4)
    if tf32:
        a, b = round_to_tf32(a), round_to_tf32(b)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=5e-5)


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 without the last 13 bits of its fraction, which tensor cores do not read."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_split_matmul_under_locks(target: str) -> None:
    a, b, out = torch.randn(20, 130).half(), torch.randn(130, 40).half(), unwritten(20, 40)
    lock, count = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with emulate(target):
        split_matmul_kernel[(1, 2, 3)](a, b, out, lock, count, 20, 40, 130, SPLIT=3, BM=32, BN=32)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=5e-5)
    assert count.tolist() == [3, 3, 0, 0]


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_is_a_function_of_its_seed(target: str) -> None:
    x = torch.randn(1000)
    outs = []
    for seed in (1, 1, 2):
        out = unwritten(1000)
        with emulate(target):
            dropout_kernel[(4,)](x, out, 1000, 0.3, seed, BLOCK=256)
        outs.append(out)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    kept = outs[0] != 0
    torch.testing.assert_close(outs[0][kept], (x / 0.7)[kept])
    # Four standard deviations of a binomial.
    assert abs(kept.float().mean().item() - 0.7) < 4 * math.sqrt(0.21 / 1000)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention(target: str, dtype: torch.dtype, causal: bool) -> None:
    heads, t, d = 2, 50, 32
    q, k, v = (torch.randn(heads, t, d).to(dtype) for _ in range(3))
    out = unwritten(heads, t, d, dtype=dtype)
    with emulate(target):
        attention_kernel[(2, heads)](q, k, v, out, d**-0.5, t, D=d, BM=32, BN=32, CAUSAL=causal, num_warps=2)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    # The weights are rounded to dtype before they meet v.
    tolerance = 2e-3 if dtype == torch.float16 else 1.6e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", TARGETS)
def test_atomics(target: str) -> None:
    x = torch.randint(0, 10, (500,), dtype=torch.int32)
    counts, sums = torch.zeros(10, dtype=torch.int32), torch.zeros(2)
    with emulate(target):
        histogram_kernel[(4,)](x, counts, sums, 500, BLOCK=128)
    assert counts.tolist() == torch.bincount(x, minlength=10).tolist()
    assert sums.tolist() == [x.sum().item(), x.max().item()]


@pytest.mark.parametrize("target", TARGETS)
def test_scan_and_sort(target: str) -> None:
    x, out = torch.randn(200), unwritten(400)
    with emulate(target):
        scan_kernel[(1,)](x, out, 200, BLOCK=256)
    torch.testing.assert_close(out[:200], x.double().cumsum(0).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[200:], x.sort().values)

"""The compiled kernels on a real GPU against the references on the CPU.

Skipped without one. With one: `TRITON_INTERPRET=0 pytest tests/kernels/test_on_gpu.py`.
"""

from typing import Any

import pytest
import torch
from stacks import stack_of
from tiny import randomize, some_ids, tiny_llama
from tolerances import TOLERANCES
from torch import Tensor

from minipeft import LoraConfig, get_peft_model
from minipeft.kernels import adamw_, adamw_8bit_, lora_matmul, nf4_matmul, nf4_quantize
from minipeft.nf4 import NF4Config, NF4Weight, quantize_model
from minipeft_kernels.adamw.eight_bit import initial_state
from minipeft_kernels.dispatch import interpreting
from minipeft_kernels.experts.op import experts_linear, experts_reference
from minipeft_kernels.linear import thin
from minipeft_kernels.linear.op import linear_reference
from minipeft_kernels.nf4.checks import BLOCKSIZES
from minipeft_kernels.nf4.dequantize import nf4_dequantize_reference
from minipeft_kernels.nf4.quantize import nf4_quantize_reference, quantize_absmax_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU, uninterpreted")

DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantization_is_bit_identical(blocksize: int, dtype: torch.dtype) -> None:
    scales = torch.tensor([1.0, 1e-3, 1e-40 if dtype == torch.float32 else 1e-4])
    for n in (1, blocksize + 1, 3 * 4096 + 77, 1 << 20):
        w = (torch.randn(n) * scales[torch.arange(n) * 3 // n]).to(dtype)
        for ours, right in zip(
            nf4_quantize(w.to(DEVICE), blocksize), nf4_quantize_reference(w, blocksize), strict=True
        ):
            assert torch.equal(ours.cpu(), right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantization_and_decoding_are_bit_identical(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    w = NF4Weight.quantize(torch.randn(333, 1024).to(DEVICE, dtype))
    assert w.offset is not None and w.nested_absmax is not None
    # The mean's order of summing differs from device to device: the rest is compared for the GPU's.
    _, absmax = nf4_quantize(torch.randn(333, 1024).to(DEVICE, dtype))
    codes, nested, offset = torch.ops.minipeft.quantize_absmax(absmax)
    right = quantize_absmax_reference(absmax.cpu(), offset.cpu())
    assert torch.equal(codes.cpu(), right[0]) and torch.equal(nested.cpu(), right[1])
    decoded = w.dequantize().cpu()
    monkeypatch.setenv("MINIPEFT_BACKEND", "reference")
    assert torch.equal(decoded, w.to("cpu").dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (4096, 4096), (100, 192), (33, 100)])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64, 65, 300])
def test_products_equal_float64(rows: int, n: int, k: int, double: bool, dtype: torch.dtype) -> None:
    w = NF4Weight.quantize(torch.randn(n, k, device=DEVICE) / k**0.5, 64, double)
    shapes: list[tuple[Tensor, torch.dtype]] = [
        (torch.randn(rows, k), dtype),
        (torch.randn(8, k) / k**0.5, torch.float32),
        (torch.randn(n, 8), torch.float32),
        (torch.randn(n), torch.float32),
    ]
    inputs = [t.to(DEVICE, d).requires_grad_() for t, d in shapes]
    x, lora_A, lora_B, bias = inputs
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = lora_matmul(x, w.packed(), lora_A, lora_B, 0.5, bias)
    x64, A64, B64, bias64 = exact
    y64 = linear_reference(x64, w.packed(), bias64, (A64, B64, 0.5))
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(y64, exact, dy.double())
    for ours, right in zip((y, *gradients[0]), (y64, *gradients[1]), strict=True):
        tolerance = TOLERANCES[dtype]
        size = max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(ours.double(), right, rtol=tolerance["rtol"], atol=tolerance["atol"] * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", DTYPES[:2])
@pytest.mark.parametrize("kind", ["nf4", "dense", "none"])
@pytest.mark.parametrize("counts", [[1, 0, 0, 1], [9, 0, 40, 3], [300, 1, 500, 0]])
def test_experts_equal_float64(counts: list[int], kind: str, adapters: torch.dtype, dtype: torch.dtype) -> None:
    stack = stack_of(torch.randn(4, 96, 256, device=DEVICE) / 16)
    w = torch.stack([nf4_dequantize_reference(stack.expert(e), torch.float64) for e in range(4)]).view(4, 96, 256)
    weight: Any = {"dense": w.to(dtype), "none": None}.get(kind, stack)
    exact_w: Any = {"dense": w.to(dtype).double(), "none": 0 * w}.get(kind, w)
    x = torch.randn(sum(counts) + 5, 256).to(DEVICE, dtype).requires_grad_()
    lora_A = (torch.randn(4, 8, 256) / 16).to(DEVICE, adapters).requires_grad_()
    lora_B = torch.randn(96, 8 * 4).to(DEVICE, adapters).unflatten(1, (8, 4)).permute(2, 0, 1).requires_grad_()
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    inputs = [x, lora_A, lora_B]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = experts_linear(x, offsets, weight, (lora_A, lora_B, 0.5))
    y64 = experts_reference(exact[0], offsets, exact_w, (*exact[1:], 0.5))
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(y64, exact, dy.double())
    for ours, right in zip((y, *gradients[0]), (y64, *gradients[1]), strict=True):
        tolerance = TOLERANCES[min(dtype, adapters, key=lambda d: torch.finfo(d).bits)]
        size = max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(ours.double(), right, rtol=tolerance["rtol"], atol=tolerance["atol"] * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_equals_the_reference(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    hyper: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    shapes = [(3,), (64, 33), (16, 4096), (2049,)]
    params, grads = [torch.randn(s).to(dtype) for s in shapes], [torch.randn(s).to(dtype) for s in shapes]
    results = {}
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        monkeypatch.setenv("MINIPEFT_BACKEND", backend)
        p, g = [t.to(device, copy=True) for t in params], [t.to(device) for t in grads]
        moments = [[torch.zeros(t.shape, device=device) for t in p] for _ in range(2)]
        narrow, state = [t.clone() for t in p], list(zip(*map(initial_state, p), strict=True))
        for step in (1, 2, 3):
            adamw_(p, g, *moments, step=step, **hyper)
            adamw_8bit_(narrow, g, *state, step=step, **hyper)
        results[backend] = [t.cpu() for t in (*p, *moments[0], *moments[1])], [t.cpu() for t in narrow]
    exact, coarse = zip(results["triton"], results["reference"], strict=True)
    for ours, right in zip(*exact, strict=True):
        torch.testing.assert_close(ours, right, rtol=torch.finfo(ours.dtype).eps, atol=1e-6)
    for ours, right in zip(*coarse, strict=True):
        # A last bit of float32 may move an 8-bit moment to the next entry, a 64th away, in each of three steps of lr.
        torch.testing.assert_close(ours, right, rtol=torch.finfo(ours.dtype).eps, atol=3 * 1e-2 / 64)


def test_a_training_step_equals_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend, device in (("triton", DEVICE), ("reference", "cpu")):
        monkeypatch.setenv("MINIPEFT_BACKEND", "reference")
        model: Any = tiny_llama()
        quantize_model(model, NF4Config())
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).to(device)
        randomize(model)
        monkeypatch.setenv("MINIPEFT_BACKEND", backend)
        ids = some_ids().to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 29
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("m", [1, 16, 60, 2048])
@pytest.mark.parametrize("rank", [4, 16, 33, 128])
def test_small_products_have_the_precision_of_float32_and_the_same_bits(m: int, rank: int) -> None:
    """bfloat16 activations and float32 factors, of which one bfloat16 part would be off by 2e-3."""
    x, k = torch.randn(m, 1600).bfloat16().to(DEVICE), 1600
    a, b, g = (torch.randn(*shape).to(DEVICE) for shape in ((rank, k), (k, rank), (m, rank)))
    for make, left, right in (
        (lambda: thin.project(x, a, 0.5, torch.float32), 0.5 * x.double(), a.T),
        (lambda: thin.project_back(x, b, 2.0, torch.float32), 2.0 * x.double(), b),
        (lambda: thin.grad_of_A(g, x, torch.float32), g.T, x),
        (lambda: thin.grad_of_B(x, g, torch.float32), x.T, g),
    ):
        made, left, right = make(), left.double(), right.double()
        assert ((made.double() - left @ right).abs() <= 2e-6 * (left.abs() @ right.abs())).all()
        assert all(torch.equal(make(), made) for _ in range(10))


def test_captured_graphs_have_counters_of_their_own_and_launch_nothing_to_clear_them() -> None:
    """Two graphs and launches of no graph at the same time, on three streams, give the bits that each gives alone."""
    w = NF4Weight.quantize(torch.randn(1024, 4096, device=DEVICE).bfloat16())
    inputs = [torch.randn(1, 4096, device=DEVICE).bfloat16() for _ in range(3)]
    with torch.no_grad():
        right = [nf4_matmul(x, w.packed()) for x in inputs]
        graphs, outputs = [], []
        for x in inputs[:2]:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                outputs.append([nf4_matmul(x, w.packed()) for _ in range(50)])
        for _ in range(20):
            torch.cuda.synchronize()
            for graph in graphs:
                with torch.cuda.stream(torch.cuda.Stream()):
                    graph.replay()
            beside = [nf4_matmul(inputs[2], w.packed()) for _ in range(20)]
            torch.cuda.synchronize()
            for ys, y in zip([*outputs, beside], right, strict=True):
                assert all(torch.equal(each, y) for each in ys)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            graphs[0].replay()
            torch.cuda.synchronize()
    launched = [event.key for event in profile.key_averages()]
    assert not [name for name in launched if "fill" in name.lower() or "memset" in name.lower()], launched

"""Products with a frozen dense weight, alone and with LoRA's update, against float64 and finite differences."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft.kernels import frozen_linear, lora_linear
from minipeft_kernels import arithmetic
from minipeft_kernels.linear.op import _run, _run_backward, linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 40), flips=st.tuples(st.booleans(), st.booleans()))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("least", [1, 1 << 40])
def test_product_is_the_same_in_both_libraries(least: int, m: int, n: int, k: int, flips: tuple[bool, bool]) -> None:
    before, arithmetic.LEAST = arithmetic.LEAST, least
    try:
        a, w = (
            torch.randn(k, rows).T if flip else torch.randn(rows, k) for rows, flip in zip((m, n), flips, strict=True)
        )
        y = arithmetic.dense_product(a, w)
    finally:
        arithmetic.LEAST = before
    torch.testing.assert_close(y, (a.double() @ w.double().T).float(), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_product_of_nothing(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    y = arithmetic.dense_product(torch.randn(m, k), torch.randn(n, k))
    assert y.shape == (m, n) and not y.any()


def test_large_float32_products_go_to_onednn_where_it_is_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(64, 1024)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        arithmetic.dense_product(a, torch.randn(64, 1024))
        arithmetic.dense_product(a[:1], torch.randn(64, 1024))
        arithmetic.dense_product(a.double(), torch.randn(64, 1024).double())
        monkeypatch.setattr(arithmetic, "HAS_ONEDNN", False)
        arithmetic.dense_product(a, torch.randn(64, 1024))
    calls = {event.key: event.count for event in profile.key_averages()}
    expected = arithmetic._find_onednn()
    assert calls.get("mkldnn::_linear_pointwise", 0) == int(expected)
    assert calls["aten::mm"] == 4 - int(expected)


def layer(dtype: torch.dtype, bias: bool = True, n: int = 6, k: int = 8) -> dict[str, Any]:
    x, lora_A, lora_B = torch.randn(2, 5, k).to(dtype), torch.randn(3, k), torch.randn(n, 3)
    trained = {"x": x, "lora_A": lora_A, "lora_B": lora_B, **({"bias": torch.randn(n).to(dtype)} if bias else {})}
    return {"weight": torch.randn(n, k).to(dtype), "bias": None, **{k: t.requires_grad_() for k, t in trained.items()}}


def exact(weight: Tensor, bias: Tensor | None, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return linear_reference(x, weight, bias, (lora_A, lora_B, scaling))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_agree_with_finite_differences(transposed: bool) -> None:
    own = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in layer(torch.float32).items()}
    weight = own["weight"].T.contiguous().T if transposed else own["weight"]
    inputs = (own["x"], own["bias"], own["lora_A"], own["lora_B"])
    assert torch.autograd.gradcheck(lambda x, b, A, B: lora_linear(x, weight, b, A, B, 0.7), inputs)
    assert torch.autograd.gradcheck(lambda x, b: frozen_linear(x, weight, b), inputs[:2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_gradients_are_those_of_float64(dtype: torch.dtype, bias: bool) -> None:
    own = layer(dtype, bias)
    wide = {n: t if t is None else t.detach().double().requires_grad_(t.requires_grad) for n, t in own.items()}
    y, right = lora_linear(**own, scaling=0.5), exact(**wide, scaling=0.5)
    assert y.dtype == dtype and own["lora_A"].dtype == torch.float32
    dy = torch.randn_like(y)
    y.backward(dy)
    right.backward(dy.double())
    for got, want in [(y, right), *((own[n].grad, wide[n].grad) for n in own if own[n] is not None and n != "weight")]:
        scale = want.abs().max()
        torch.testing.assert_close((got / scale).double(), want / scale, **TOLERANCES[dtype])
    assert own["weight"].grad is None


def test_sixteen_bits_are_multiplied_in_float32_where_the_cpu_would_emulate_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "CPU_DTYPES", frozenset({torch.float32}))
    own = layer(torch.bfloat16)
    dtypes: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                dtypes.update(t.dtype for t in args if isinstance(t, Tensor))
            return func(*args, **(kwargs or {}))

    with Watch():
        # Below the operations' own registration, which hides what they call.
        numbers = (0.5, torch.bfloat16, torch.float32)
        y = _run(own["x"], None, own["lora_A"], own["lora_B"], *numbers, own["weight"])[0]
        dy = torch.randn_like(y)
        rest = (own["lora_A"], own["lora_B"], torch.randn(10, 3), *numbers, [True, True, True])
        _run_backward(dy, own["x"], *rest, own["weight"])
        _run(own["x"], own["bias"], None, None, *numbers, own["weight"])
    assert dtypes == {torch.float32} and y.dtype == torch.bfloat16


def test_nothing_is_kept_that_backward_does_without() -> None:
    own = layer(torch.float32)
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(**own, scaling=0.5)
        assert sorted(kept) == sorted([(2, 5, 8), (6, 8), (3, 8), (6, 3), (10, 3)])
        kept.clear()
        frozen_linear(own["x"], own["weight"], own["bias"])
        assert kept == [(6, 8)]


def test_autocast_decides_the_dtype() -> None:
    own = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = lora_linear(**own, scaling=0.5), frozen_linear(own["x"], own["weight"])
    assert y.dtype == plain.dtype == torch.bfloat16
    y.sum().backward()
    assert own["x"].grad.dtype == own["lora_A"].grad.dtype == torch.float32
    right = exact(**{n: t.detach() for n, t in own.items()}, scaling=0.5)
    torch.testing.assert_close(y.float(), right, rtol=0.05, atol=0.2)

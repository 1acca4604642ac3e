"""Launches of products that were launched before: they go past Triton, and still to the compilation that they want."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from nf4_weights import Weight
from proof_products import prove
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from minipeft.kernels import lora_matmul, nf4_matmul
from minipeft.kernels.emulator import emulate
from minipeft_kernels import dispatch, prepared
from minipeft_kernels.linear import op
from minipeft_kernels.linear.gpu import launch_forward
from minipeft_kernels.nf4.dequantize import nf4_dequantize_reference
from minipeft_kernels.nf4.dequantize_triton import dequantize_into

pytestmark = pytest.mark.skipif(not prepared.LAUNCHES_AGAIN, reason="this Triton is asked at every launch")


class Asked:
    """How often Triton was asked which compilation a launch wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = JITFunction.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(JITFunction, "run", counted)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def product(x: torch.Tensor, weight: Weight, **options: Any) -> None:
    """x W^T + b + low up^T in the emulator equals float64."""
    with emulate("sm_80", counts=False):
        y = launch_forward(x, weight.packed, **options)
    right = x.double() @ weight.dense.T
    if "bias" in options:
        right += options["bias"].double()
    if "update" in options:
        low, up = options["update"]
        right += low.double() @ up.double().T
    torch.testing.assert_close(y.double(), right, rtol=2e-2, atol=2e-2)


def test_triton_is_asked_once_of_launches_that_are_alike(asked: Asked) -> None:
    for _ in range(3):  # new tensors, new addresses
        prove("sm_80", 3, Weight(96, 192), torch.bfloat16, grad=False, bias=True, rank=3)
    assert asked.count == 1
    prove("sm_90", 3, Weight(96, 192), torch.bfloat16, grad=False, bias=True, rank=3)
    assert asked.count == 2


def test_what_chooses_a_compilation_is_not_taken_for_what_was_before(asked: Asked) -> None:
    """By dtype of an operand, by addresses and pitches that no multiple of 16 divides, by numbers of 64 bits."""
    weight = Weight(96, 256)
    x = torch.randn(4, 256).bfloat16()
    product(x, weight)
    assert asked.count == 1
    product(torch.randn(4, 264).bfloat16()[:, :256], weight)  # a pitch that 16 does not divide
    product(torch.randn(4 * 256 + 3).bfloat16()[3:].view(4, 256), weight)  # an address
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        product(x, weight, bias=torch.randn(96).to(dtype))
        product(x, weight, update=(torch.randn(4, 2).to(dtype), torch.randn(96, 2).to(dtype)))
    product(x, weight, bias=torch.randn(97)[1:])
    assert asked.count == 10
    product(torch.randn(4, 512).bfloat16()[:, :256], weight)  # another pitch, which 16 divides
    product(torch.randn(4, 280).bfloat16()[:, :256], weight)
    product(x, weight, bias=torch.randn(96))
    product(x, weight, update=(torch.randn(4, 5).bfloat16(), torch.randn(96, 5).bfloat16()))
    product(torch.randn(4 * 256 + 5).bfloat16()[5:].view(4, 256), weight)  # another address of that kind
    assert asked.count == 10


def test_decoding_asks_once_a_size_and_dtype(asked: Asked) -> None:
    for _ in range(2):
        for weight in (Weight(96, 256), Weight(96, 256, double=False), Weight(5, 100)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                with emulate("sm_80", counts=False):
                    out = dequantize_into(torch.empty(weight.dense.shape, dtype=dtype), weight.packed)
                assert torch.equal(out, nf4_dequantize_reference(weight.packed, dtype))
    assert asked.count == 9


def test_a_weight_that_moved_is_read_where_it_is() -> None:
    """Nothing is kept of a weight: not its address, nor what it was checked for."""
    old, new = Weight(96, 256), Weight(96, 256)
    x = torch.randn(4, 256).bfloat16()
    product(x, old)
    for mine, other in zip(old.packed.tensors(), new.packed.tensors(), strict=True):
        mine.data = other.data
    old.dense = new.dense
    product(x, old)
    old.packed.absmax.data = old.packed.absmax.data[:-1]
    with pytest.raises(ValueError, match="absmax of the NF4 weight must be 384"):
        product(x, old)


def test_a_profiler_is_told_of_every_launch(asked: Asked) -> None:
    import triton

    told: list[str] = []
    hook = lambda metadata: told.append(metadata.get()["name"])  # noqa: E731
    weight, x = Weight(96, 128), torch.randn(4, 128).bfloat16()
    product(x, weight)
    enter = triton.knobs.runtime.launch_enter_hook
    enter.add(hook)
    try:
        product(x, weight)
        product(x, weight)
    finally:
        enter.remove(hook)
    assert told == ["_nf4_matmul_direct_kernel"] * 2


class IdleDriver:
    """Compiles, and launches nothing: what is left of a launch is its time on the host."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *of: (None, object(), 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 999_999  # which neither a GPU has nor the emulator's

    def get_current_stream(self, device: int) -> int:
        return 0


def python_calls(call: Any) -> Counter[str]:
    """The Python functions that a call runs, each by file and name."""
    found: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found[f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"] += 1

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that computes nothing."""
    monkeypatch.delenv("MINIPEFT_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "emulating", lambda device: False)  # of tensors on a GPU it is known at once
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device: "")
    monkeypatch.setattr(op, "runs_native", lambda x: False)
    before = driver._active
    driver.set_active(IdleDriver())
    yield
    driver.set_active(before)


def hot_calls(call: Callable[[], Any]) -> Counter[str]:
    """The Python functions of a call like two before: none looks into the environment, plans or asks Triton."""
    for _ in range(2):
        call()
    calls = python_calls(call)
    assert not [name for name in calls if name.startswith(("os.py", "jit.py", "tiles.py:tile", "tiles.py:split"))]
    return calls


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("rows", [1, 64])
def test_a_launch_like_one_before_is_few_calls(rows: int) -> None:
    weight, x = Weight(128, 2048).packed, torch.randn(rows, 2048).bfloat16()
    calls = hot_calls(lambda: launch_forward(x, weight))
    assert sum(calls.values()) <= 30, calls


@pytest.mark.usefixtures("idle")
def test_products_through_their_operation_are_few_calls() -> None:
    """Six launches: of y, of dx, and of LoRA's four small products."""
    weight, x, dy = Weight(96, 256).packed, torch.randn(1, 1, 256).bfloat16(), torch.ones(1, 1, 96).bfloat16()
    lora_A, lora_B = torch.randn(4, 256, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    calls = hot_calls(lambda: nf4_matmul(x, weight))
    assert sum(calls.values()) <= 60, calls
    calls = hot_calls(lambda: lora_matmul(x.requires_grad_(), weight, lora_A, lora_B, 2.0).backward(dy))
    assert sum(calls.values()) <= 255, calls

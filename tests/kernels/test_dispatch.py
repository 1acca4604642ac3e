"""Reference or kernel: the rules, one by one."""

import logging
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from processes import run_process

from minipeft.kernels import nf4_quantize
from minipeft_kernels import dispatch, native

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dispatch.triton_obstacle.cache_clear()
    yield
    dispatch.triton_obstacle.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without the interpreter, and no backend forced."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.delenv("MINIPEFT_BACKEND", raising=False)


@pytest.mark.usefixtures("compiled")
def test_a_cpu_takes_the_compiled_code_where_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    for obstacle in ("", "it was not built"):
        monkeypatch.setattr(dispatch, "native_obstacle", lambda obstacle=obstacle: obstacle)
        assert not dispatch.use_triton(CPU)
        assert dispatch.use_native(CPU) == (not obstacle)


@pytest.mark.usefixtures("compiled")
def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "reference")
    assert not dispatch.use_triton(CPU) and not dispatch.use_native(CPU)


@pytest.mark.usefixtures("compiled")
def test_compiled_cpu_code_does_not_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = type("OnGPU", (), {"device": torch.device("cuda", 0), "is_cpu": False})()
    assert not dispatch.use_native(gpu)
    monkeypatch.setattr(native, "obstacle", lambda: "")
    monkeypatch.setenv("MINIPEFT_BACKEND", "native")
    with pytest.raises(RuntimeError, match="native, but compiled CPU code does not run on device type cuda"):
        dispatch.use_triton(gpu)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("backend", ["", "reference", "triton"])
def test_a_gpu_takes_the_kernel_unless_forced(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", backend)
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    gpu = type("OnGPU", (), {"device": torch.device("cuda", 0)})()
    assert dispatch.use_triton(gpu) == (backend != "reference")


def test_the_interpreter_takes_the_kernel_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIPEFT_BACKEND")
    assert dispatch.interpreting()
    assert dispatch.use_triton(CPU)


def test_the_variable_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, kernel in (("reference", False), ("triton", True), ("reference", False)):
        monkeypatch.setenv("MINIPEFT_BACKEND", backend)
        assert dispatch.use_triton(CPU) == kernel


@pytest.mark.parametrize("backend", ["Triton", "cuda", "0", "reference "])
def test_another_value_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", backend)
    with pytest.raises(ValueError, match=f"one of reference, native, triton, ptx, or unset, got '{backend}'"):
        nf4_quantize(torch.ones(64))


@pytest.mark.usefixtures("compiled")
def test_a_forced_kernel_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"MINIPEFT_BACKEND=triton, but on a CPU .* set TRITON_INTERPRET=1"):
        nf4_quantize(torch.ones(64))


@pytest.mark.usefixtures("compiled")
def test_a_gpu_without_triton_takes_the_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    gpu = type("OnGPU", (), {"device": torch.device("cuda", 0)})()
    with caplog.at_level(logging.WARNING, logger="minipeft"):
        assert not dispatch.use_triton(gpu) and not dispatch.use_triton(gpu)
    assert ["triton is not installed" in record.message for record in caplog.records] == [True]
    monkeypatch.setenv("MINIPEFT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="triton is not installed"):
        dispatch.use_triton(gpu)


@pytest.mark.usefixtures("compiled")
def test_a_gpu_that_triton_does_not_support_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: 75)
    assert "compute capability 8.0, and cuda:0 has 7.5" in dispatch.triton_obstacle(torch.device("cuda", 0))
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 2))
    dispatch.triton_obstacle.cache_clear()
    assert "Triton 3.2 cannot compile these kernels, 3.3 can" in dispatch.triton_obstacle(torch.device("cuda", 0))
    assert "device type mps" in dispatch.triton_obstacle(torch.device("mps"))


def test_a_machine_without_triton_has_every_operation() -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it fails
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from minipeft.nf4 import NF4Linear
from minipeft.kernels import adamw_
layer = NF4Linear.from_linear(torch.nn.Linear(64, 32))
layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
p = torch.ones(3)
adamw_([p], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], step=1, lr=0.1)
assert (p < 1).all()
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("MINIPEFT_BACKEND", "TRITON_INTERPRET")}
    run_process([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.usefixtures("compiled")
def test_the_emulator_takes_tensors_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "ptx")
    assert dispatch.use_triton(CPU) and dispatch.emulating(CPU.device)
    assert dispatch.capability(CPU.device) == 80
    monkeypatch.setenv("MINIPEFT_PTX_TARGET", "sm_90")
    assert dispatch.capability(CPU.device) == 90
    gpu = type("OnGPU", (), {"device": torch.device("cuda", 0)})()
    with pytest.raises(RuntimeError, match=r"MINIPEFT_BACKEND=ptx, but .* on the CPU, and this one is on cuda:0"):
        dispatch.use_triton(gpu)


def test_the_emulator_does_not_run_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPEFT_BACKEND", "ptx")
    with pytest.raises(RuntimeError, match="MINIPEFT_BACKEND=ptx, but TRITON_INTERPRET is set"):
        dispatch.use_triton(CPU)

"""The choice of an operation's form: Triton kernel, compiled CPU code or PyTorch reference. Nothing else decides it.

Tensors on a GPU that Triton compiles for go to the kernel. Tensors on a CPU go to the compiled code where it was built
and has the operation (decoding and products of NF4 weights), else to the reference. With TRITON_INTERPRET=1, which
Triton reads when its kernels are defined, they go to the kernel on a CPU too, run by Triton's interpreter: that is how
kernels are tested without a GPU. MINIPEFT_BACKEND=reference, =native or =triton forces one, and is read at every call;
a forced one that cannot run is an error. MINIPEFT_BACKEND=ptx compiles the kernels for a GPU that need not be there,
MINIPEFT_PTX_TARGET (sm_80), and runs that code on tensors on a CPU, in an emulator that registers itself here; so does
an emulation that is active.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from . import native

logger = logging.getLogger("minipeft")

VARIABLE = "MINIPEFT_BACKEND"
BACKENDS = ("reference", "native", "triton", "ptx")
TARGET_VARIABLE = "MINIPEFT_PTX_TARGET"
DEFAULT_TARGET = "sm_80"
# Triton compiles for NVIDIA and AMD, which PyTorch both calls "cuda", and for Intel.
GPUS = ("cuda", "xpu")
# The oldest NVIDIA GPUs that Triton supports, and the first with bfloat16.
MIN_CAPABILITY = 80

# The first that passes a tuple from one function of device code to another. 3.2 interprets all of them.
MIN_TRITON = (3, 3)

# The module that registers an emulator, imported when MINIPEFT_BACKEND=ptx asks for one.
EMULATOR_MODULE = "minipeft_kernels.lab.emulation"


class Emulator(Protocol):
    """Runs compiled kernels on tensors on the CPU, as a GPU would that need not be there."""

    def active_target(self) -> str | None:
        """The architecture that is emulated at this moment, such as "sm_80", or None."""

    def launching(self, target: str, reached: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """A context in which a kernel is launched for `target`; `reached` as in `on_device`."""

    def multiprocessors(self, target: str) -> int:
        """The number of multiprocessors of the emulated GPU."""


_emulator: Emulator | None = None


def register_emulator(emulator: Emulator) -> None:
    """Let `emulator` run the operations while it is active, and under MINIPEFT_BACKEND=ptx."""
    global _emulator
    _emulator = emulator


def _registered_emulator() -> Emulator:
    """The emulator, which is imported if nobody has yet."""
    if _emulator is None:
        importlib.import_module(EMULATOR_MODULE)
    assert _emulator is not None
    return _emulator


# The dictionary behind `os.environ`, where a name that is not there takes a twentieth of the time to miss.
_HELD = getattr(os.environ, "_data", os.environ)
_KEY = os.environ.encodekey(VARIABLE) if _HELD is not os.environ else VARIABLE


def _forced() -> str:
    """MINIPEFT_BACKEND as it is now, or "" where it is not set: asked at every call of every layer."""
    return os.environ[VARIABLE] if _KEY in _HELD else ""


def use_triton(tensor: Tensor) -> bool:
    """True if an operation on `tensor` runs as a Triton kernel.

    Raises:
        ValueError: MINIPEFT_BACKEND has another value than those it may have.
        RuntimeError: it asks for a form that cannot run on the tensor's device; says why.
    """
    forced = _forced()
    if forced in ("reference", "native"):
        if forced == "native":
            _check_native(tensor.device)
        return False
    if forced not in ("", *BACKENDS):
        raise ValueError(f"{VARIABLE} must be one of {', '.join(BACKENDS)}, or unset, got {forced!r}")
    if forced == "ptx" or emulating(tensor.device):
        return _use_emulator(tensor.device)
    obstacle = triton_obstacle(tensor.device)
    if not obstacle:
        return True
    if forced:
        raise RuntimeError(f"{VARIABLE}=triton, but {obstacle}")
    return False


def use_native(tensor: Tensor) -> bool:
    """True if an operation that compiled CPU code has runs there, given that `use_triton` has said no."""
    return tensor.is_cpu and _forced() != "reference" and not native_obstacle()


def runs_native(tensor: Tensor) -> bool:
    """True if `use_triton` says no and `use_native` yes: in one question, which is asked at every token and layer."""
    if tensor.is_cpu and not _forced() and _active_target() is None and not interpreting():
        return not native_obstacle()
    return not use_triton(tensor) and use_native(tensor)


@functools.cache
def native_obstacle() -> str:
    """The reason why the compiled CPU code cannot run, or "" if it can. The reason is also logged, once."""
    obstacle = native.obstacle()
    if obstacle:
        logger.warning("%s; until then NF4 runs in plain PyTorch on the CPU, several times slower", obstacle)
    return obstacle


def _check_native(device: torch.device) -> None:
    if native.obstacle():
        raise RuntimeError(f"{VARIABLE}=native, but {native.obstacle()}")
    if device.type != "cpu":
        raise RuntimeError(f"{VARIABLE}=native, but compiled CPU code does not run on device type {device.type}")


def _use_emulator(device: torch.device) -> bool:
    if device.type != "cpu":
        raise RuntimeError(f"{VARIABLE}=ptx, but the emulator takes tensors on the CPU, and this one is on {device}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{VARIABLE}=ptx, but triton is not installed (pip install triton)")
    if interpreting():
        raise RuntimeError(f"{VARIABLE}=ptx, but TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    return True


def emulating(device: torch.device) -> bool:
    """True if kernels on `device` are run by the emulator."""
    return device.type == "cpu" and (_forced() == "ptx" or _active_target() is not None)


def emulated_target() -> str:
    """The architecture that is emulated: that of the active emulation, or as MINIPEFT_PTX_TARGET says."""
    return _active_target() or os.environ.get(TARGET_VARIABLE, DEFAULT_TARGET)


def _active_target() -> str | None:
    # An emulator that was never imported is not active.
    return None if _emulator is None else _emulator.active_target()


@functools.cache
def triton_obstacle(device: torch.device) -> str:
    """The reason why Triton cannot run on `device`, or "" if it can. On a GPU the reason is also logged, once."""
    obstacle = _find_obstacle(device)
    if obstacle and device.type in GPUS:
        logger.warning("%s: minipeft's operations run in plain PyTorch there", obstacle)
    return obstacle


def _find_obstacle(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if interpreting():
        return "" if device.type in ("cpu", *GPUS) else f"the interpreter does not run on device type {device.type}"
    if device.type == "cpu":
        return "on a CPU a Triton kernel needs the interpreter: set TRITON_INTERPRET=1 before Python starts"
    if device.type not in GPUS:
        return f"Triton does not compile for device type {device.type}"
    if triton_version() < MIN_TRITON:
        have, wanted = (".".join(map(str, version)) for version in (triton_version(), MIN_TRITON))
        return f"Triton {have} cannot compile these kernels, {wanted} can (torch 2.7 and later bring it)"
    if capability(device) < MIN_CAPABILITY:
        return f"Triton needs an NVIDIA GPU of compute capability 8.0, and {device} has {capability(device) / 10}"
    return ""


@functools.cache
def triton_version() -> tuple[int, int]:
    """The version of the installed Triton, (3, 9) of 3.9.0."""
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def interpreting() -> bool:
    """True if kernels run in Triton's interpreter. Fixed by the first call, as kernels are by their definition."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def has_permutes(device: torch.device) -> bool:
    """True if kernels on `device` may permute bytes in inline assembly: compiled, for NVIDIA hardware."""
    nvidia = (device.type == "cuda" and torch.version.hip is None) or emulating(device)
    return nvidia and not interpreting()


def capability(device: torch.device) -> int:
    """The compute capability of an NVIDIA GPU, 90 for 9.0; 80 for other GPUs, which are in no table."""
    return int(emulated_target().removeprefix("sm_")) if emulating(device) else _capability(device)


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU, on a CPU of the emulated one; 1 where it is not known."""
    if emulating(device):
        return _registered_emulator().multiprocessors(emulated_target())
    return _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(
    tensor: Tensor, reached: Callable[[], dict[str, Tensor]] | None = None
) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched where the tensor is: Triton launches on the current GPU.

    Args:
        reached: gives the tensors, by name, that the kernel finds by addresses in memory. A GPU does not ask; the
            emulator does.
    """
    if tensor.is_cuda:
        return _HERE if torch.cuda.current_device() == tensor.get_device() else torch.cuda.device(tensor.device)
    if emulating(tensor.device):
        return _registered_emulator().launching(emulated_target(), reached() if reached else {})
    return _HERE


_HERE = contextlib.nullcontext()

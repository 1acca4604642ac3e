"""A stand-in for Triton's driver: kernels are compiled to PTX for a GPU that is not there, and launched elsewhere.

Triton asks its driver for the target to compile for, gives it the compiled binary to load, and calls its launcher. The
stand-in answers all three: the "binary" is the PTX itself (the assembler, `ptxas`, is left out), the launcher hands a
`Request` to whoever made the driver. A device of the stand-in has a number that no GPU has, so Triton's caches of
compiled kernels, which go by device, never mix the two.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from .lanes import WARP
from .targets import MULTIPROCESSORS

TRITON_VERSIONS = ("3.8", "3.9")
MAX_THREADS = 1024
# Above any number of a GPU; the capability is added, since Triton keeps one target a device.
FIRST_DEVICE = 1_000_000


@dataclass(frozen=True)
class Loaded:
    """A kernel that the driver "loaded": a kernel's name and PTX."""

    name: str
    ptx: str


@dataclass(frozen=True)
class Request:
    """One launch as Triton asks for it.

    Attributes:
        name: of the kernel. ptx: its code.
        grid: blocks along x, y, z. warps: of a block. shared: bytes of dynamic shared memory a block.
        scratch: bytes of global scratch memory a block, or 0.
        arguments: (name, Triton's type such as "*fp32" or "i32", value), constants left out, tuples flattened: these,
            and two pointers to scratch memory, are the parameters of the PTX entry.
        constants: what the kernel was compiled with, by name.
    """

    name: str
    ptx: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    scratch: int
    arguments: tuple[tuple[str, str, Any], ...]
    constants: dict[str, Any]


class EmulatedDriver:
    """A driver, as far as Triton asks for one, for a GPU of one capability."""

    def __init__(self, capability: int, launch: Callable[[Request], None]) -> None:
        self.capability = capability
        self.launch = launch
        properties = {
            "max_shared_mem": MULTIPROCESSORS[capability].shared_block,
            "multiprocessor_count": 1,
            "warpSize": WARP,
            "max_num_regs": MULTIPROCESSORS[capability].registers,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=_load,
            unload_module=lambda module: None,
        )
        self.launcher_cls = _Launcher

    def get_current_target(self) -> Any:
        """The `GPUTarget` that Triton compiles for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        """A number that no GPU has."""
        return FIRST_DEVICE + self.capability

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        """The only stream, 0."""
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """(8, 0) for capability 80."""
        return self.capability // 10, self.capability % 10

    def get_active_torch_device(self) -> Any:
        """The CPU, where an emulated kernel's tensors lie."""
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        """The stand-in for an autotuner's timer."""
        return _first_is_best


def _first_is_best(call: Callable[[], Any], quantiles: Any = None, **rest: Any) -> Any:
    """Autotuning without times: all configurations are level, and the first of those that are level is taken.

    An autotuner keeps the benchmarker that it asked for first, so this one passes a real GPU's questions on.
    """
    active = _triton_driver().active
    if not isinstance(active, EmulatedDriver):
        return active.get_benchmarker()(call, quantiles=quantiles, **rest)
    return [0.0] * len(quantiles) if quantiles else 0.0


def _load(name: str, binary: bytes, shared: int, device: int) -> tuple[None, Loaded, int, int, int]:
    # No module: Triton would ask whatever driver is there when the kernel is dropped to unload it.
    return None, Loaded(name, binary.decode()), 0, 0, MAX_THREADS


class _Launcher:
    """Made by Triton once for a compiled kernel, and called at every launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.names = tuple(source.fn.arg_names)
        self.types = tuple(source.signature.values())
        self.constants = {self.names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        self.metadata = metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        loaded: Loaded,
        packed: Any,
        data: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        active = _triton_driver().active
        assert isinstance(active, EmulatedDriver), "a kernel that was compiled to be emulated is launched outside"
        if min(x, y, z) < 0:
            raise ValueError(f"a grid must not be negative, got {(x, y, z)}")
        if getattr(self.metadata, "num_ctas", 1) != 1:
            raise NotImplementedError(f"{loaded.name}: clusters of {self.metadata.num_ctas} blocks are not emulated")
        if enter is not None:
            enter(data)
        active.launch(
            Request(
                name=loaded.name,
                ptx=loaded.ptx,
                grid=(int(x), int(y), int(z)),
                warps=self.metadata.num_warps,
                shared=self.metadata.shared,
                scratch=self.metadata.global_scratch_size,
                arguments=tuple(flatten(self.names, self.types, arguments)),
                constants=self.constants,
            )
        )
        if leave is not None:
            leave(data)


def flatten(names: Any, types: Any, values: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, type, value) of each parameter: tuples taken apart ("sizes.1"), constants left out."""
    for name, kind, value in zip(names, types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flatten([f"{name}.{i}" for i in range(len(kind))], kind, tuple(value))
        elif kind != "constexpr":
            yield name, kind, value


def check_triton() -> None:
    """Raise unless the installed Triton compiles and is of a version that the stand-in was tried with.

    Raises:
        RuntimeError: it is of another version, or its interpreter is on.
    """
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    if version not in TRITON_VERSIONS:
        raise RuntimeError(
            f"triton {triton.__version__} is installed, and kernels are emulated with {' and '.join(TRITON_VERSIONS)}: "
            f'pip install "triton=={TRITON_VERSIONS[-1]}.*"'
        )
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled. Unset it to emulate them")


@contextlib.contextmanager
def active_driver(driver: EmulatedDriver) -> Iterator[None]:
    """A context in which Triton compiles to PTX for `driver` and launches through it; all is put back at its end."""
    from triton import knobs

    holder = _triton_driver()
    # The attribute, not the property: the property would look for a GPU, and raise where there is none.
    before, hook = holder._active, knobs.runtime.add_stages_inspection_hook
    holder.set_active(driver)
    knobs.runtime.add_stages_inspection_hook = _stop_at_ptx(hook)
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = hook
        holder.set_active(before)


def _stop_at_ptx(before: Callable[..., Any] | None) -> Callable[..., Any]:
    """Triton's hook over its stages of compilation: the last one, the assembler, gives back the PTX it is given.

    Called without arguments it names the change, for the caches; called with a backend and its stages it makes it.
    """

    def hook(backend: Any = None, stages: dict[str, Any] | None = None, *rest: Any) -> tuple[str, str] | None:
        if stages is None:
            key, digest = before() if before is not None else ("", "")
            return f"{key}ptx", f"{digest}ptx"
        if before is not None:
            before(backend, stages, *rest)
        stages["cubin"] = lambda ptx, metadata: ptx.encode()
        return None

    return hook


def _triton_driver() -> Any:
    from triton.runtime import driver

    return driver

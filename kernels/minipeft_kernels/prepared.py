"""Launching a compiled kernel again, without asking Triton which of its compilations the arguments want.

`kernel[grid](...)` looks at every argument at every launch, to choose among the compilations of a kernel: by the dtype
of a tensor, by whether an address or a number divides by 16, by whether a number is 1 or needs 64 bits. That is most of
a small launch's time on the host. Whoever can say all of it in a key of its own keeps what the first launch compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .dispatch import interpreting

# Bytes to whose multiples Triton wants addresses, and numbers, to read and write so many at once.
ALIGNMENT = 16
# Where `CompiledKernel.run` takes (x, y, z, stream, function, metadata, data, enter, leave, *all arguments). And AMD's
# compilations go by the sizes of tensors, too.
_KNOWN = ((3, 6), (3, 9)) if torch.version.hip is None else ((0, 0), (0, 0))
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
LAUNCHES_AGAIN = _KNOWN[0] <= _VERSION <= _KNOWN[1]
"""True if this Triton's compiled kernels can be launched here."""

Launch = Callable[..., None]


class Prepared:
    """The launches of one kernel with one grid and one set of constants, each kept with its key.

    Attributes:
        kernel: a function of `triton.jit`.
        grid: programs along x and y.
        constants: its `tl.constexpr` arguments, by name; they come last in its signature.
        options: warps and the like.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int], constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self._kept: dict[Hashable, Launch] = {}

    def __call__(self, tensors: Sequence[Tensor], numbers: Sequence[float], key: Hashable) -> None:
        """Launch the kernel on the current device, which is that of the tensors, and its current stream.

        Args:
            tensors, numbers: its arguments before the constants, in its order.
            key: two calls with equal keys have tensors of the same dtypes, and numbers that Triton takes for alike, but
                for those that need 64 bits. Addresses are looked at here.
        """
        addresses = [t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        if not LAUNCHES_AGAIN or max(numbers) >= 2**31 or interpreting() or _is_watched(self.kernel):
            self._ask_triton(tensors, numbers)
            return
        if bits % ALIGNMENT:
            key = key, *[address % ALIGNMENT == 0 for address in addresses]
        on_gpu, active = tensors[0].is_cuda, driver.active
        device = tensors[0].get_device() if on_gpu else active.get_current_device()
        launch = self._kept.get((device, key))
        if launch is not None:
            # A GPU's launcher asks a tensor for its address, and the GPU's driver whether that is one.
            launch(active.get_current_stream(device), addresses if on_gpu else tensors, numbers)
            return
        compiled = self._ask_triton(tensors, numbers)
        if isinstance(compiled, CompiledKernel):
            self._kept[device, key] = self._again(compiled)

    def _ask_triton(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Any:
        return self.kernel[self.grid](*tensors, *numbers, **self.constants, **self.options)

    def _again(self, compiled: Any) -> Launch:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        x, y = self.grid
        names = self.kernel.arg_names
        constants = tuple(self.constants[name] for name in names[len(names) - len(self.constants) :])

        def launch(stream: int, pointers: Sequence[Any], numbers: Sequence[float]) -> None:
            run(x, y, 1, stream, function, metadata, None, None, None, *pointers, *numbers, *constants)

        return launch


def _is_watched(kernel: Any) -> bool:
    """True if a profiler, say, is told of every launch: by Triton alone."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks)

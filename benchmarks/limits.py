"""The limits of a device: bytes a second, and operations a second for each dtype (Williams et al. 2009).

For GPUs that the tables know, the maker's numbers: dense, without sparsity, with float32 accumulation. For everything
else, CPUs first, what the machine itself reaches in the same run in a copy or addition and a matrix product of torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.device import MIB, Device
from minipeft_kernels.lab.roofline import GPUS

# The name that CUDA reports, without "NVIDIA" -> GB/s and TFLOP/s in bfloat16 and float16. Only the whole
# name counts: a laptop's GPU is called almost like the desktop's.
SAME = {
    "GeForce RTX 3090": "RTX 3090",
    "GeForce RTX 4090": "RTX 4090",
    "L40S": "L40S",
    "A100-SXM4-80GB": "A100 SXM 80 GB",
    "H100 80GB HBM3": "H100 SXM",
    "H200": "H200 SXM",
    "B200": "B200",
}
_KNOWN = {gpu.name: (gpu.bandwidth, gpu.tflops) for gpu in GPUS}
DATASHEET: dict[str, tuple[float, float]] = {
    **{reported: _KNOWN[name] for reported, name in SAME.items() if name in _KNOWN},
    "A10": (600, 125),
    "A100-SXM4-40GB": (1555, 312),
    "A100-PCIE-40GB": (1555, 312),
    "A100 80GB PCIe": (1935, 312),
    "H100 PCIe": (2039, 756),
    "L4": (300, 121),
}

# Bytes copied and rows of the square matrices multiplied to measure a limit. A CPU's product is short, so that on a
# busy machine some of the rounds are not interrupted.
MEASURED = {"cpu": (256 * MIB, 768), "cuda": (1024 * MIB, 8192)}
ROUNDS = 40


@dataclass
class Roofline:
    """A device's limits.

    bandwidth: bytes a second. flops: floating-point operations a second by dtype. source: where they are from.
    measure, measure_bandwidth: find them out, where no maker says them.
    """

    bandwidth: float
    source: str
    flops: dict[torch.dtype, float] = field(default_factory=dict)
    measure: Callable[[torch.dtype], float] | None = None
    measure_bandwidth: Callable[[], float] | None = None

    def measure_again(self) -> None:
        """Raise the measured limits to what the machine reaches now, if that is more: it may have been busy before."""
        if self.measure_bandwidth is not None:
            self.bandwidth = max(self.bandwidth, self.measure_bandwidth())
        if self.measure is not None:
            self.flops = {dtype: max(rate, self.measure(dtype)) for dtype, rate in self.flops.items()}

    def flops_of(self, dtype: torch.dtype) -> float | None:
        """Operations a second in `dtype`, measured at the first question where they are not known."""
        if dtype not in self.flops and self.measure is not None:
            self.flops[dtype] = self.measure(dtype)
        return self.flops.get(dtype)

    def floor_seconds(self, nbytes: int, flops: int, dtype: torch.dtype) -> float:
        """The least time for moving so many bytes and doing so many operations, whichever takes longer."""
        seconds = nbytes / self.bandwidth
        rate = self.flops_of(dtype) if flops else None
        return max(seconds, flops / rate) if rate else seconds


def roofline_of(device: Device, name: str, quick: bool = False) -> Roofline:
    """The datasheet's limits of the GPU `name`, or those measured on `device` now."""
    known = name.removeprefix("NVIDIA ")
    if device.torch_device.type == "cuda" and known in DATASHEET:
        gigabytes, tera = DATASHEET[known]
        flops = {torch.bfloat16: tera * 1e12, torch.float16: tera * 1e12}
        return Roofline(gigabytes * 1e9, f"data sheet of {known}", flops)
    nbytes, size = (8 * MIB, 256) if quick else MEASURED[device.torch_device.type]
    return Roofline(
        memory_bandwidth(device, nbytes),
        "measured in this run: torch copy or addition, torch matmul",
        measure=lambda dtype: matmul_flops(device, dtype, size),
        measure_bandwidth=lambda: memory_bandwidth(device, nbytes),
    )


def memory_bandwidth(device: Device, nbytes: int) -> float:
    """Bytes read and written a second by torch, the best of several copies of `nbytes` and of additions in place.

    A CPU reads what a copy will overwrite, which nobody counts; in place that is read anyway.
    """
    source = torch.zeros(nbytes // 4, device=device.torch_device)
    target = torch.zeros_like(source)
    return 2 * nbytes / min(_best(device, lambda: target.copy_(source)), _best(device, lambda: target.add_(1)))


def matmul_flops(device: Device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of torch's product of two square matrices, x W^T, in `dtype`, the best of several."""
    a = torch.randn(size, size, device=device.torch_device).to(dtype)
    b = torch.randn(size, size, device=device.torch_device).to(dtype)
    return 2 * size**3 / _best(device, lambda: torch.nn.functional.linear(a, b))


def _best(device: Device, run: Callable[[], object]) -> float:
    run()
    marks = []
    for _ in range(ROUNDS):
        start = device.mark()
        run()
        marks.append((start, device.mark()))
    device.synchronize()
    # A limit is what was reached once; other programs only ever make it lower.
    return min(device.seconds(*pair) for pair in marks)

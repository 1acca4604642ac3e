"""The clocks: how a call is timed on a CPU and on a CUDA GPU, and how its caches are emptied before.

A device gives marks, and the seconds between two of them. On CUDA marks are events in the stream, so the queue keeps
running ahead of the GPU and what is timed is the GPU's work; the seconds can be read after `synchronize`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.options import BenchError

MIB = 1 << 20
# Emptying a cache writes twice its size, within these bounds; on CUDA never less than triton.testing.do_bench does.
MIN_CPU_FLUSH, MAX_CPU_FLUSH, MIN_CUDA_FLUSH = 64 * MIB, 512 * MIB, 256 * MIB

# Before each call a GPU waits until Python has queued all of it: half as long again as the slowest call of a case took
# to be queued, the same for all of them. Clock cycles, of which a GPU has two in a nanosecond at most; and the longest
# wait, for calls that themselves wait for the GPU, which no head start helps.
LEAST_HEAD_START, CYCLES_A_SECOND, LONGEST_WAIT = 1_000_000, 2e9, 0.5


class Device(Protocol):
    """The clock and the caches of a device, as the harness uses them."""

    warmups: int
    """Rounds that are run and not timed."""

    clock: str
    """What the marks are of, in words."""

    @property
    def torch_device(self) -> torch.device:
        """The device that tensors are made on."""

    def mark(self) -> Any:
        """A point in time."""

    def seconds(self, start: Any, stop: Any) -> float:
        """From one mark to another; both lie before the last `synchronize`."""

    def flush(self) -> None:
        """Put other data in the caches: in a model, other layers ran since this weight was last read."""

    def expect(self, host_seconds: float) -> None:
        """The host takes at most so long to queue one of the calls that come."""

    def synchronize(self) -> None:
        """Wait for all work; raises if any of it failed."""


class CpuDevice:
    """The clock on the wall, or for one thread the CPU's time, and a buffer of twice the last-level cache.

    One thread that only computes takes as long on the wall as on its CPU, unless other programs take the CPU away:
    on a busy machine that doubles and trebles times, by chance. Several threads wait for each other, so there only the
    wall tells.
    """

    torch_device = torch.device("cpu")
    warmups = 1

    def __init__(self, flush_bytes: int | None = None) -> None:
        alone = torch.get_num_threads() == 1
        self.clock = "CPU time of the process, which has one thread" if alone else "wall"
        self._now = time.process_time if alone else time.perf_counter
        size = flush_bytes if flush_bytes is not None else _bounded(2 * last_level_cache(), MIN_CPU_FLUSH)
        self._buffer = torch.zeros(size // 4)

    def mark(self) -> float:
        """The clock's time, in seconds."""
        return self._now()

    def seconds(self, start: float, stop: float) -> float:
        """The seconds between two marks."""
        return stop - start

    def flush(self) -> None:
        """Read and write the buffer, which leaves nothing else in the cache."""
        self._buffer.add_(1)

    def expect(self, host_seconds: float) -> None:
        """A CPU's calls are not queued."""

    def synchronize(self) -> None:
        """Nothing to wait for: a CPU's calls return when they are done."""


class CudaDevice:
    """CUDA events on the current stream, and a buffer of at least twice the L2 cache."""

    torch_device = torch.device("cuda")
    warmups = 5
    clock = "CUDA events"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.torch_device)
        size = max(MIN_CUDA_FLUSH, 2 * getattr(properties, "L2_cache_size", 0))
        self._buffer = torch.empty(size // 4, dtype=torch.int32, device=self.torch_device)
        self.head_start = LEAST_HEAD_START

    def mark(self) -> torch.cuda.Event:
        """An event in the stream, which the GPU passes when it has done all that was queued before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """The seconds of the GPU between two events that it has passed."""
        return start.elapsed_time(stop) / 1e3

    def flush(self) -> None:
        """Overwrite the L2 cache, and let the GPU wait until Python has queued the next call."""
        self._buffer.zero_()
        torch.cuda._sleep(self.head_start)

    def expect(self, host_seconds: float) -> None:
        """Wait so much longer than that before the calls that come."""
        self.head_start = max(LEAST_HEAD_START, int(1.5 * min(host_seconds, LONGEST_WAIT) * CYCLES_A_SECOND))

    def synchronize(self) -> None:
        """Wait for the GPU; raises RuntimeError if any of its work failed."""
        torch.cuda.synchronize(self.torch_device)


def open_device(kind: str | None = None, quick: bool = False) -> Device:
    """The device named "cpu" or "cuda"; None for CUDA where there is one.

    Raises:
        BenchError: another name, or CUDA asked for and not there.
    """
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise BenchError("device cuda is asked for, and this PyTorch sees no CUDA GPU: leave --device out for CPU")
        return CudaDevice()
    if kind != "cpu":
        raise BenchError(f"device must be cpu or cuda, got {kind!r}")
    return CpuDevice(flush_bytes=0 if quick else None)


def last_level_cache() -> int:
    """Bytes of the first CPU's largest cache; 0 where Linux does not tell."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)


def _bounded(size: int, least: int) -> int:
    return min(max(size, least), MAX_CPU_FLUSH)

"""Room for the programs that share a tile: for their partial sums, and counters, which are zeros before and after.

Launches that follow each other can have the same counters, and those of one stream do. What a CUDA graph launches runs
whenever and beside whatever it is replayed, so each captured graph has counters of its own, from a supply that was
filled before; where that is used up, zeros that the graph makes once a replay.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

# Counters of a stream, or of a graph: more than a product has tiles, but for many rows of a large vocabulary.
COUNT = 4096
# Graphs that have counters from the supply, and streams within them; later ones make zeros of their own.
GRAPHS = 128


class Counters:
    """The counters of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of_stream: dict[int, Tensor] = {}
        self._of_capture: dict[int, tuple[int, Tensor]] = {}
        self._supply: list[Tensor] | None = None

    def of(self, stream: int, tiles: int) -> Tensor:
        """At least `tiles` zeros, int32, for a launch on a stream on which nothing is captured."""
        held = self._of_stream.get(stream)
        if held is None or held.numel() < tiles:
            held = self._of_stream[stream] = self._zeros(max(tiles, COUNT))
            if self._supply is None:
                self._supply = list(self._zeros(GRAPHS * COUNT).split(COUNT))
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # whoever takes of it may be on another stream
        return held

    def captured(self, stream: int, capture: int | None, tiles: int) -> Tensor:
        """As `of`, for a launch that becomes part of a graph.

        Args:
            capture: a number that no other capture has; None where it is not known.
        """
        known, held = self._of_capture.get(stream, (None, None))
        if held is not None and known == capture and held.numel() >= tiles:
            return held
        if capture is None:
            return self._zeros(tiles)
        # From the supply for good: nobody says when a graph is gone. What is made here belongs to the graph, which
        # fills it at the start of every replay.
        held = self._supply.pop() if self._supply and tiles <= COUNT else self._zeros(max(tiles, COUNT))
        self._of_capture[stream] = capture, held
        return held

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device)


def counters_for(device: torch.device, tiles: int) -> Tensor:
    """Counters for a launch on the current stream of an NVIDIA or AMD GPU, int32, of `tiles` or more."""
    stream = driver.active.get_current_stream(device.index)
    if torch.cuda.is_current_stream_capturing():
        return _counters(device).captured(stream, _capture_on(stream), tiles)
    return _counters(device).of(stream, tiles)


_counters = functools.cache(Counters)


def _capture_on(stream: int) -> int | None:
    """CUDA's number of the capture that goes on on a stream, which no other capture of the process has."""
    ask = _capture_info()
    status, number = ctypes.c_int(), ctypes.c_uint64()
    # The last pointers, of which CUDA 11.3 to 13 know three or four, are to what is not asked for.
    arguments = (ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None, None)
    if ask is None or ask(*arguments) != 0 or status.value != 1:
        return None
    return number.value


@functools.cache
def _capture_info() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    versions = ("cuStreamGetCaptureInfo_v3", "cuStreamGetCaptureInfo_v2")
    return next((getattr(driver, name) for name in versions if hasattr(driver, name)), None)


def workspace(device: torch.device, tiles: int, split: int, size: int) -> tuple[Tensor, Tensor]:
    """Room for partial sums, and counters that are zero before every launch and after it."""
    if split == 1:
        return _nothing(device), _nothing(device)
    partial = torch.empty(tiles * split * size, dtype=torch.float32, device=device)
    if device.type == "cuda":
        return partial, counters_for(device, tiles)
    return partial, torch.zeros(tiles, dtype=torch.int32, device=device)


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)

"""The GPU's time of a call: a captured graph of calls over many copies of the weight, replayed.

A graph has no Python between its kernels, for ours and for the peers alike; the copies together exceed the L2 cache
twice, so that every call reads its weight from memory, as in a model. On a CPU, where one only pretends, calls are
timed by the wall.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.harness import describe, quantile

Call = Callable[[], Any]

ROUNDS = 9
# A replay that lasts so long is timed well by two events.
LEAST_SECONDS = 1e-3
POISONED = 1 << 26


def copies_for(nbytes: int) -> int:
    """Copies of a weight of so many bytes that together exceed the L2 cache at least twice; on a CPU one."""
    if not torch.cuda.is_available():
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(32, max(2, -(-5 * cache // (2 * nbytes))))


@functools.cache
def stream() -> Any:
    """The stream that graphs are captured on: autograd's backward runs where its forward ran."""
    return torch.cuda.Stream()


def on_stream() -> contextlib.AbstractContextManager[Any]:
    """Work inside is queued where graphs are captured."""
    return torch.cuda.stream(stream()) if torch.cuda.is_available() else contextlib.nullcontext()


def poison() -> None:
    """Leave NaN in the memory that the next results will get: what a kernel does not write shows."""
    if torch.cuda.is_available():
        torch.full((POISONED,), float("nan"), device="cuda")


class Graph:
    """Calls captured once, to be replayed."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = list(calls)
        self._graph: Any = None
        if not torch.cuda.is_available():
            return
        torch.cuda.synchronize()
        with on_stream():
            for call in self.calls[:2]:
                call()
        torch.cuda.synchronize()
        # Not by torch.cuda.graph, which collects garbage and empties the allocator's cache before each capture.
        graph = torch.cuda.CUDAGraph()
        with on_stream():
            graph.capture_begin()
            try:
                for call in self.calls:
                    call()
            finally:
                graph.capture_end()
        self._graph = graph

    def seconds(self) -> float:
        """Of one call, the mean of a replay (or of enough replays to be timed well)."""
        if self._graph is None:
            start = time.perf_counter()
            for call in self.calls:
                call()
            return (time.perf_counter() - start) / len(self.calls)
        times, spent = 1, 0.0
        while True:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                self._graph.replay()
            stop.record()
            stop.synchronize()
            spent = start.elapsed_time(stop) / 1e3
            if spent >= LEAST_SECONDS or times >= 64:
                return spent / times / len(self.calls)
            times *= 2

    def free(self) -> None:
        """Give the graph's memory back."""
        self._graph, self.calls = None, []


def best(calls: Sequence[Call]) -> float:
    """Seconds of one of these calls, captured as one graph: the least of three replays."""
    graph = Graph(calls)
    seconds = min(graph.seconds() for _ in range(3))
    graph.free()
    return seconds


def interleaved(graphs: dict[str, Graph], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds a call of each, round by round, in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    if not torch.cuda.is_available():
        rounds = 1
    for graph in graphs.values() if rounds > 1 else ():
        graph.seconds()
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(graph.seconds())
    return times


def timed(calls: dict[str, Sequence[Call]], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Microseconds of each: {"us", "q20", "q80"}, or {"failed"}; and the first's ratio to each, round by round."""
    graphs: dict[str, Graph] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, own in calls.items():
        try:
            graphs[name] = Graph(own)
        # Whatever a peer throws in a capture: the others are timed all the same.
        except Exception as error:
            results[name] = {"failed": describe(error)}
    times = interleaved(graphs, rounds)
    ours = times.get(next(iter(calls)), [])
    for name, seconds in times.items():
        us = [1e6 * quantile(seconds, share) for share in (0.5, 0.2, 0.8)]
        results[name] = dict(zip(("us", "q20", "q80"), us, strict=True))
        if ours:
            results[name]["ratio"] = median(a / b for a, b in zip(ours, seconds, strict=True))
    for graph in graphs.values():
        graph.free()
    return results

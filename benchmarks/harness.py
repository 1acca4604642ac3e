"""The one way anything is measured here: first the result is checked, then ours and the peers are timed in turn.

Every candidate of a case runs once and its result is compared with a float64 one computed in the same run. A candidate
whose result is wrong is not timed. The others run interleaved, A B C A B C ..., caches emptied before each call, so
that what else the machine does meets all of them alike. Shown are the median and the 20% and 80% quantiles, and the
ratio of ours to each peer: of each round by itself, then its median and quantiles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.device import Device
from benchmarks.limits import Roofline

Run = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 7, 200
SECONDS_PER_CASE = 3.0
OURS = "minipeft"


@dataclass(frozen=True)
class Work:
    """The least work of a candidate: bytes to read and to write once, and operations (a multiply-add is two).

    dtype: the matrix instructions' whose limit counts.
    """

    nbytes: int
    flops: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Candidate:
    """One implementation of a case.

    make: prepares inputs and gives the call that is timed; what it raises is reported, not passed on.
    error: how far the call's first result is from the right one; may be inf, or nan, which is never right.
    tolerance: the largest error that is right.
    """

    name: str
    make: Callable[[], Run]
    error: Callable[[Any], float]
    tolerance: float
    work: Work


@dataclass(frozen=True)
class Measured:
    """The result of a run that measures itself, where a clock around the call would not do.

    value: seconds, or what else the case's unit says. result: what is checked.
    """

    value: float
    result: Any


@dataclass(frozen=True)
class Missing:
    """A peer that cannot take part, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One operation at one size: ours first, then the peers.

    unit: "us" for times; "bytes" where every call gives a `Measured` of bytes.
    rounds: None for as many as fit in the seconds of a case, within bounds.
    """

    op: str
    variant: str
    shape: str
    dtype: str
    candidates: Sequence[Candidate | Missing]
    unit: str = "us"
    rounds: int | None = None


@dataclass
class Row:
    """The outcome of one candidate of one case. Times are in microseconds, or bytes where unit says so.

    status: "right", "wrong" (and not timed), "failed" (raised) or "missing"; note says more.
    ratio: ours / this one's, of each round by itself; below 1 ours is faster.
    floor: the least time for this candidate's bytes and operations; share: floor / median.
    """

    op: str
    variant: str
    shape: str
    dtype: str
    candidate: str
    status: str
    note: str = ""
    error: float | None = None
    tolerance: float | None = None
    rounds: int = 0
    median: float | None = None
    q20: float | None = None
    q80: float | None = None
    ratio: float | None = None
    ratio_q20: float | None = None
    ratio_q80: float | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    floor: float | None = None
    share: float | None = None
    unit: str = "us"


@dataclass
class _Entry:
    """A row in the making."""

    row: Row
    work: Work | None = None
    run: Run | None = None
    first: Measured | None = None
    seconds: list[float] = field(default_factory=list)


def measure(
    case: Case, device: Device, roofline: Roofline, quick: bool = False, seconds: float = SECONDS_PER_CASE
) -> list[Row]:
    """Check and time the candidates of a case.

    Args:
        quick: one round and no warm-up: shows that everything runs, not how fast.
        seconds: that the rounds of the case should take.

    Returns:
        One row for each candidate, in their order.
    """
    entries = [_check(case, candidate, device) for candidate in case.candidates]
    timed = [entry for entry in entries if entry.run is not None]
    rounds = 1 if quick else case.rounds
    try:
        times = _known(timed) if rounds == 1 else None
        times = times or interleave([entry.run for entry in timed if entry.run], device, rounds, seconds)
    except Exception as error:
        for entry in timed:
            entry.row.status, entry.row.note = "failed", f"while timing: {describe(error)}"
        return [entry.row for entry in entries]
    for entry, seconds in zip(timed, times, strict=True):
        entry.seconds = seconds
    ours = next((e.seconds for e in timed if e.row.candidate == OURS), None)
    for entry in timed:
        _fill(entry, ours, roofline)
    return [entry.row for entry in entries]


def _known(timed: Sequence[_Entry]) -> list[list[float]] | None:
    """The values that the checked calls have measured already, or None if one did not: enough for a single round."""
    firsts = [entry.first for entry in timed]
    return [[first.value] for first in firsts if first] if all(firsts) else None


def _check(case: Case, candidate: Candidate | Missing, device: Device) -> _Entry:
    """Run a candidate once and compare; its `run` is kept only when the result was right."""
    row = Row(case.op, case.variant, case.shape, case.dtype, candidate.name, "missing", unit=case.unit)
    if isinstance(candidate, Missing):
        row.note = candidate.reason
        return _Entry(row)
    try:
        run = candidate.make()
        result = run()
        device.synchronize()
        first, result = (result, result.result) if isinstance(result, Measured) else (None, result)
        row.error, row.tolerance = float(candidate.error(result)), candidate.tolerance
    # Whatever a peer or a kernel throws on hardware that we have not seen: the table goes on, and says so.
    except Exception as error:
        row.status, row.note = "failed", describe(error)
        return _Entry(row)
    if not row.error <= row.tolerance:
        row.status, row.note = "wrong", f"error {row.error:.2g}, at most {row.tolerance:.2g} is right: not timed"
        return _Entry(row)
    row.status = "right"
    return _Entry(row, candidate.work, run, first)


def interleave(
    runs: Sequence[Run], device: Device, rounds: int | None = None, seconds: float = SECONDS_PER_CASE
) -> list[list[float]]:
    """Seconds of every call of every run (or what it `Measured`), round by round: each run once a round, in order.

    Args:
        rounds: None for as many as fit in `seconds`, within bounds, after the device's warm-up.
    """
    if rounds is None:
        rounds = _warm_up(runs, device, seconds)
    marks: list[list[tuple[Any, Any] | float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, own in zip(runs, marks, strict=True):
            device.flush()
            start = device.mark()
            result = run()
            own.append(result.value if isinstance(result, Measured) else (start, device.mark()))
            # Not kept while the next one runs: the gradients of a step are large.
            del result
    device.synchronize()
    return [[mark if isinstance(mark, float) else device.seconds(*mark) for mark in own] for own in marks]


def _warm_up(runs: Sequence[Run], device: Device, seconds: float) -> int:
    """Run the untimed rounds, tell the device how long a call takes to be queued, and say how many timed ones fit."""
    queued = 0.0
    for run in runs if device.warmups > 1 else ():
        run()
        device.synchronize()
        start = time.perf_counter()
        run()
        queued = max(queued, time.perf_counter() - start)
    device.expect(queued)
    for _ in range(device.warmups):
        device.synchronize()
        start = time.perf_counter()
        for run in runs:
            device.flush()
            run()
        device.synchronize()
        spent = time.perf_counter() - start
    return min(MAX_ROUNDS, max(MIN_ROUNDS, round(seconds / max(spent, 1e-9))))


def _fill(entry: _Entry, ours: list[float] | None, roofline: Roofline) -> None:
    row, work, seconds = entry.row, entry.work, entry.seconds
    assert work is not None
    row.rounds = len(seconds)
    middle = median(seconds)
    scale = 1e6 if row.unit == "us" else 1.0
    row.median, row.q20, row.q80 = (scale * s for s in (middle, quantile(seconds, 0.2), quantile(seconds, 0.8)))
    if ours is not None and seconds is not ours:
        ratios = [a / b for a, b in zip(ours, seconds, strict=True)]
        row.ratio, row.ratio_q20, row.ratio_q80 = median(ratios), quantile(ratios, 0.2), quantile(ratios, 0.8)
    if row.unit != "us" or not (work.nbytes or work.flops):
        return
    row.gb_per_s = work.nbytes / middle / 1e9
    row.gflop_per_s = work.flops / middle / 1e9 if work.flops else None
    floor = roofline.floor_seconds(work.nbytes, work.flops, work.dtype)
    row.floor, row.share = 1e6 * floor, floor / middle


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, between neighbours in proportion."""
    return float(np.quantile(values, share))


def distance(result: Tensor | Sequence[Tensor], right: Tensor | Sequence[Tensor]) -> float:
    """The largest difference of two results, as a multiple of the right one's root mean square.

    Of sequences, the largest of their parts'. inf when a shape differs or a number is not finite.
    """
    if not isinstance(right, Tensor):
        if isinstance(result, Tensor) or len(result) != len(right):
            return math.inf
        return max((distance(a, b) for a, b in zip(result, right, strict=True)), default=0.0)
    if not isinstance(result, Tensor) or result.shape != right.shape:
        return math.inf
    if right.numel() == 0:
        return 0.0
    wide = result.detach().to(torch.float64)
    if not bool(torch.isfinite(wide).all()):
        return math.inf
    right = right.to(torch.float64)
    scale = float(right.square().mean().sqrt())
    worst = float((wide - right).abs().max())
    return worst / scale if scale else (math.inf if worst else 0.0)


def describe(error: Exception) -> str:
    """An error in one line, not too long for a table."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

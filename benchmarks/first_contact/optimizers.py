"""AdamW over the adapters of Llama-3-8B's shape and over one large tensor; paged AdamW beside what the bus gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.first_contact.record import Contact
from benchmarks.harness import describe
from benchmarks.peers import BITSANDBYTES, Peers
from minipeft.kernels import adamw_, adamw_8bit_
from minipeft.optim import PagedAdamW
from minipeft_kernels.adamw.eight_bit import initial_state

ADAPTERS = [(16, 4096), (4096, 16), (16, 4096), (1024, 16), (16, 4096), (14336, 16), (16, 14336), (4096, 16)] * 56
LARGE = [(1 << 26,)]
PAGED = 1 << 28  # parameters, whose state is 2 GiB
STEPS = 4
CLOCK = 2e9  # the most that a multiprocessor counts in a second


def run(contact: Contact) -> None:
    """A row for each optimizer and set of parameters."""
    for what, shapes in (("adapters", ADAPTERS), ("one of 67M", LARGE)):
        shapes = [(33, 5), (64,)] if contact.pretend else shapes
        _update(contact, what, shapes)
    _paged(contact)


def _update(contact: Contact, what: str, shapes: list[tuple[int, ...]]) -> None:
    params = [torch.randn(s, device=contact.device) for s in shapes]
    grads = [torch.randn_like(p) for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    narrow = list(zip(*map(initial_state, params), strict=True))
    numel = sum(p.numel() for p in params)
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "minipeft 32": (lambda: adamw_(params, grads, *moments, step=2, lr=1e-3), 28),
        "minipeft 8": (lambda: adamw_8bit_(params, grads, *narrow, step=2, lr=1e-3), 16.06),
    }
    for name, make in _peers(contact).items():
        own = [p.clone().requires_grad_() for p in params]
        for p, g in zip(own, grads, strict=True):
            p.grad = g
        calls[name] = (make(own).step, 28 if "8" not in name else 16.06)
    for name, (call, nbytes) in calls.items():
        try:
            wall = _wall(contact, call)
        except Exception as error:
            contact.row(what=f"{what}, {name}", failed=describe(error))
            continue
        gpu = 1e6 * _on_gpu(contact, call, wall)
        contact.row(what=f"{what}, {name}", us=1e6 * wall, gpu_us=gpu, gpu_gb_per_s=nbytes * numel / gpu / 1e3)


def _peers(contact: Contact) -> dict[str, Callable[[Any], Any]]:
    found: dict[str, Callable[[Any], Any]] = {"torch fused": lambda p: torch.optim.AdamW(p, fused=True)}
    bnb = Peers(contact.device).find(BITSANDBYTES)
    if not isinstance(bnb, str) and not contact.pretend:
        found["bitsandbytes 32"] = lambda p: bnb.optim.AdamW32bit(p)
        found["bitsandbytes 8"] = lambda p: bnb.optim.AdamW8bit(p)
    return found


def _wall(contact: Contact, call: Callable[[], Any]) -> float:
    for _ in range(2):
        call()
    contact.wait()
    start = time.perf_counter()
    for _ in range(STEPS):
        call()
    contact.wait()
    return (time.perf_counter() - start) / STEPS


def _on_gpu(contact: Contact, call: Callable[[], Any], wall: float) -> float:
    """Seconds of the GPU's work: it waits until Python has queued all of a call, for half as long again as it takes."""
    if contact.pretend:
        return wall
    times = []
    for _ in range(5):
        contact.wait()
        torch.cuda._sleep(int(1.5 * wall * CLOCK) + 100_000)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return min(times)


def _paged(contact: Contact) -> None:
    """A quarter of the state stays on the device: three quarters come and go each step."""
    numel = (1 << 16) if contact.pretend else PAGED
    state = 8 * numel
    for share in (1.0, 0.25):
        params = [torch.randn(numel // 16, device=contact.device).requires_grad_() for _ in range(16)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = PagedAdamW(params, lr=1e-3, device_budget=int(share * state))
        try:
            wall = _wall(contact, optimizer.step)
        except Exception as error:
            contact.row(what=f"paged, {share:.0%} on the device", failed=describe(error))
            continue
        moved = (1 - share) * state
        contact.row(what=f"paged, {share:.0%} on the device", us=1e6 * wall, gb_per_s_each_way=moved / wall / 1e9)
        if not contact.pretend:
            contact.row(what=f"paged, {share:.0%} on the device: the GPU's work", work=_work_of(optimizer.step))


def _work_of(step: Callable[[], Any]) -> dict[str, list[float]]:
    """Of each kind of work on the GPU in one step: how many, and microseconds together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kinds = sorted(found.key_averages(), key=lambda k: -k.self_device_time_total)[:6]
    return {k.key[:40]: [k.count, k.self_device_time_total] for k in kinds}

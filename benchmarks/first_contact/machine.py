"""The GPU, the versions and the limits: bytes read and written, bfloat16 products, the smallest kernel, the bus."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time

import torch

from benchmarks.first_contact.clock import Graph, timed
from benchmarks.first_contact.record import Contact

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "numpy")


def run(contact: Contact) -> None:
    """One row of versions, one for each limit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    gpu = "none: pretended" if contact.pretend else torch.cuda.get_device_name(0)
    contact.row(what="versions", gpu=gpu, python=platform.python_version(), **versions)
    if not contact.pretend:
        query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        contact.row(what="nvidia-smi", line=subprocess.run(words, capture_output=True, text=True).stdout.strip())
    device = contact.device
    nbytes, size = (1 << 20, 64) if contact.pretend else (1 << 30, 8192)
    source, target = torch.rand(nbytes // 4, device=device), torch.empty(nbytes // 4, device=device)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    tiny = torch.zeros(1, device=device)
    for _ in range(0 if contact.pretend else 300):  # until the clocks are up
        a @ b.T
    us = {
        name: timed({name: [call] * times}, rounds=5)[name]["us"]
        for name, call, times in (
            ("copy", lambda: torch.add(source, 1, out=target), 2),
            ("product", lambda: a @ b.T, 2),
            ("empty", lambda: tiny.add_(1), 64),
        )
    }
    contact.row(what="copy", bytes=2 * nbytes, us=us["copy"], gb_per_s=2 * nbytes / us["copy"] / 1e3)
    contact.row(what="bf16 product", size=size, us=us["product"], tflops=2 * size**3 / us["product"] / 1e6)
    contact.row(what="smallest kernel in a graph", us=us["empty"])
    if contact.pretend:
        return
    pinned, resident = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), source.view(torch.uint8)
    for what, call in (
        ("to device", lambda: resident.copy_(pinned, non_blocking=True)),
        ("to host", lambda: pinned.copy_(resident, non_blocking=True)),
    ):
        us["copy"] = 1e6 * Graph([call]).seconds()
        contact.row(what=f"pinned {what}", us=us["copy"], gb_per_s=nbytes / us["copy"] / 1e3)
    # Both ways at once, as paged optimizer state goes: what one takes while the other is under way.
    out = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.cuda.stream(streams[0]):
            target.view(torch.uint8).copy_(pinned, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            out.copy_(resident, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    contact.row(what="pinned both ways", us=1e6 * best, gb_per_s=nbytes / best / 1e9)

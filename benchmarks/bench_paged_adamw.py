"""PagedAdamW's step: with all state in memory, beside torch's and bitsandbytes' optimizers; and under budgets.

`minipeft bench paged_adamw` times the first, as every operation is timed. Budgets are another kind of measurement:

    python -m benchmarks.bench_paged_adamw --spill-dir DIR

gives the state all, a half, a quarter and an eighth of its bytes, each in a process of its own, so that the process's
peak memory shows what was taken. Times are of the wall, since waiting for a disk is what counts. Shown beside: bytes
moved, the least possible (every page is changed in every step, so all that do not fit must come and as many must go),
and the time that the disk itself takes for them, written and read in turn, page by page, in the same run.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT, describe_environment, device_slug, load
from benchmarks.harness import OURS, Candidate, Case, Run, Work, quantile
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.reference import adamw_steps, near
from benchmarks.resident import resident_bytes
from benchmarks.shapes import RANK, Sizes
from minipeft import PagedAdamW
from minipeft.files import write_text

OP = "paged_adamw"
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
# Parameter, both moments read and written, gradient read, in float32.
BYTES_A_PARAMETER = 28
# Three steps move a parameter by 3e-3; a thousandth of that, in units of the parameters' 0.02.
STEPS, TOLERANCE = 3, 1.5e-4

STATE_BYTES = 8
SHARES = (1.0, 0.5, 0.25, 0.125)
TORCH = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}}
PAGE = 4 << 20


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """The adapters of some layers of Llama-2-7B, then one large parameter; all state in memory."""
    adapters = [shape for n, k in sizes.lora_layers for shape in ((RANK, k), (n, RANK))]
    for shapes in (adapters, [(sizes.big_parameter,)]):
        start = [0.02 * torch.randn(shape, device=device) for shape in shapes]
        grads = [0.1 * torch.randn(shape, device=device) for shape in shapes]
        numel = sum(p.numel() for p in start)
        label = f"{len(start)} tensor{'s' * (len(start) > 1)}, {numel / 1e6:.3g}M"
        right = near(partial(_right, start, grads))
        rest = (right, TOLERANCE, Work(BYTES_A_PARAMETER * numel))
        candidates = [
            Candidate(OURS, partial(_stepper, PagedAdamW, start, grads), *rest),
            peers.candidate(BITSANDBYTES, lambda bnb, s=start, g=grads: _stepper(bnb.optim.AdamW32bit, s, g), *rest),
            *(
                Candidate(name, partial(_stepper, partial(torch.optim.AdamW, **flags), start, grads), *rest)
                for name, flags in TORCH.items()
            ),
        ]
        yield Case(OP, "all in memory", label, "float32", candidates)


def _right(start: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [adamw_steps(p, [g] * STEPS, **SETTINGS) for p, g in zip(start, grads, strict=True)]


def _stepper(kind: Callable[..., Any], start: list[Tensor], grads: list[Tensor]) -> Run:
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = kind(params, **SETTINGS)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    for _ in range(STEPS - 1):
        optimizer.step()

    def run() -> list[Tensor]:
        optimizer.step()
        return params

    return run


# Under budgets.


def main(argv: Sequence[str]) -> int:
    """Measure all budgets, print a table, write a CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_paged_adamw")
    parser.add_argument("--spill-dir", type=Path, default=Path(tempfile.gettempdir()), help="a directory on a disk")
    parser.add_argument("--parameters", type=int, default=1 << 26, help="elements of the one parameter")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each row; the median is shown")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file (default: benchmarks/results)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(_measure(**json.loads(args.one))))
        return 0
    rows, before = _rounds(args.parameters, args.spill_dir, args.rounds, args.threads), load()
    cpu = torch.device("cpu")
    words = f"python -m benchmarks.bench_paged_adamw --parameters {args.parameters} --threads {args.threads}"
    facts = describe_environment(cpu, words) | {"load": f"{before} before, {load()} after"}
    results = Path(__file__).resolve().parent / "results"
    path = args.output or results / f"{OP}-budgets-{device_slug(cpu)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    text.writelines(f"# {name}: {value}\n" for name, value in facts.items())
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
    print(text.getvalue())
    return 0


def _rounds(numel: int, spill_dir: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """All rows once a round, so that what else the machine does meets them alike; medians over the rounds."""
    budgets = {f"{OURS}, {share:g} of the state": int(share * numel * STATE_BYTES) for share in SHARES}
    settings = [{"name": name, "budget": 0} for name in TORCH]
    settings += [{"name": name, "budget": budget} for name, budget in budgets.items()]
    measured: dict[str, list[dict[str, Any]]] = {str(s["name"]): [] for s in settings}
    rates = []
    for _ in range(rounds):
        rates.append(disk_rates(spill_dir, min(256 << 20, numel * STATE_BYTES)))
        for setting in settings:
            one = json.dumps({**setting, "numel": numel, "spill_dir": str(spill_dir)})
            words = [sys.executable, "-m", "benchmarks.bench_paged_adamw", "--threads", str(threads), "--one", one]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
            measured[str(setting["name"])].append(json.loads(done.stdout))
    write, read = (median(rate) for rate in zip(*rates, strict=True))
    digests = {run["digest"] for name, runs in measured.items() for run in runs if name != "torch foreach"}
    assert len(digests) == 1, "all but torch's foreach form compute the same bits"
    return [_row(name, runs, measured["torch fused"], write, read) for name, runs in measured.items()]


def _row(
    name: str, runs: list[dict[str, Any]], peers: list[dict[str, Any]], write: float, read: float
) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    first = runs[0]
    disk = first["bytes_out"] / write + first["bytes_in"] / read
    moved = first["bytes_in"] + first["bytes_out"]
    return {
        "candidate": name,
        "step_seconds": round(median(seconds), 4),
        "q20": round(quantile(seconds, 0.2), 4),
        "q80": round(quantile(seconds, 0.8), 4),
        "to_torch_fused": round(median(a / b["seconds"] for a, b in zip(seconds, peers, strict=True)), 3),
        "stall_seconds": round(median(run["stall_seconds"] for run in runs), 4),
        "mb_moved_a_step": round(moved / 1e6, 1),
        "least_mb": round(first["least"] / 1e6, 1),
        "disk_mb_per_s_write": round(write / 1e6),
        "disk_mb_per_s_read": round(read / 1e6),
        "disk_seconds": round(disk, 4),
        "to_disk": round(median(seconds) / disk, 2) if disk else "",
        "budget_mb": round(first["budget"] / 1e6, 1),
        "peak_mb_of_process": round(median(run["peak"] for run in runs) / 1e6, 1),
    }


def _measure(name: str, budget: int, numel: int, spill_dir: str, steps: int = 4) -> dict[str, Any]:
    """One process: two steps to arrive at a steady state, then some that are timed."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(numel, generator=generator))
    p.grad = torch.randn(numel, generator=generator)
    # What torch imports at the first step of any optimizer is not the state's.
    _stepper(torch.optim.AdamW, [torch.zeros(1)], [torch.ones(1)])()
    start = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    whole = budget >= numel * STATE_BYTES
    if name in TORCH:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([p], **SETTINGS, **TORCH[name])
    else:
        memory = {} if whole else {"host_budget": budget, "spill_dir": spill_dir, "page_bytes": PAGE}
        optimizer = PagedAdamW([p], **SETTINGS, **memory)
    for _ in range(2):
        optimizer.step()
    zero = {"bytes_in": 0, "bytes_out": 0, "stall_seconds": 0.0}
    paged = isinstance(optimizer, PagedAdamW)
    before = optimizer.memory_stats() if isinstance(optimizer, PagedAdamW) else zero
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    after = optimizer.memory_stats() if isinstance(optimizer, PagedAdamW) else zero
    missing = after["pages"] * after["page_bytes"] - after["tiers"]["host"]["budget_bytes"] if paged else 0
    digest = hashlib.sha256(p.detach().numpy().data).hexdigest()
    return {
        "seconds": median(seconds),
        **{key: (after[key] - before[key]) / steps for key in zero},
        "least": 2 * missing,
        "budget": budget,
        "peak": resident_bytes("VmHWM") - start,
        "digest": digest,
    }


def disk_rates(directory: Path, size: int) -> tuple[float, float]:
    """Bytes a second that the disk writes, and reads, one page after the other, around the cache where it can be."""
    page = mmap.mmap(-1, PAGE)
    page.write(os.urandom(PAGE))
    handle, name = tempfile.mkstemp(dir=directory)
    try:
        os.close(handle)
        handle = os.open(name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        os.posix_fallocate(handle, 0, size)
        # The first time, room is written into for the first time: as slow as it will never be again.
        _timed(os.pwrite, handle, page, size)
        rates = (
            _timed(os.pwrite, handle, page, size),
            _timed(lambda h, m, at: os.preadv(h, [m], at), handle, page, size),
        )
    finally:
        os.close(handle)
        os.unlink(name)
    return rates


def _timed(call: Callable[..., int], handle: int, page: mmap.mmap, size: int) -> float:
    began = time.perf_counter()
    for offset in range(0, size - size % PAGE, PAGE):
        call(handle, page, offset)
    return (size - size % PAGE) / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every tile and division of the work that could be better than the shipped one, timed beside it.

Found by the emulator's counts are instructions; what a GPU makes of them shows here alone. Each setting's result is
compared with the shipped setting's; compiling goes ahead in several processes, on few rows of small matrices.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from unittest.mock import patch

import torch

from benchmarks.first_contact.clock import Graph
from benchmarks.first_contact.products import Weights, weights_of
from benchmarks.first_contact.record import Contact
from benchmarks.harness import distance
from minipeft.nf4 import NF4Weight
from minipeft_kernels.linear import gpu
from minipeft_kernels.linear.tiles import Tile

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
SPLITS = (1, 2, 4, 8, 16, 32)


def candidates(rows: int, grad: bool) -> list[Tile]:
    """Tiles that so many rows could take."""
    tiles = []
    at = max(8, 1 << (rows - 1).bit_length())
    for bm in sorted({min(at, 64), min(at, 32)}):
        if not grad and bm <= 32:
            for bn, nb, warps, stages in itertools.product((32, 64, 128), (2, 4), (2, 4), (2, 3, 4)):
                if bn // warps >= 16:
                    tiles.append(Tile("direct", bm, bn, nb, warps, stages))
        if grad or bm >= 16:
            for bn, warps, stages in itertools.product((64, 128), (2, 4, 8), (2, 3, 4)):
                tiles.append(Tile("staged", bm, bn, 1, warps, stages))
    return tiles


@contextmanager
def setting(tile: Tile, split: int) -> Iterator[None]:
    """Launches inside take this tile and division."""
    with (
        patch.object(gpu, "tile_for", lambda *a, **k: tile),
        patch.object(gpu, "split_for", lambda *a, **k: split),
    ):
        yield


def launch(x: torch.Tensor, weight: NF4Weight, grad: bool) -> torch.Tensor:
    """The fused kernel, at any number of rows."""
    return gpu.launch(x, weight.packed(), None, None, grad)


def _compile(task: tuple[Tile, int, bool]) -> str:
    tile, split, grad = task
    try:
        w = NF4Weight.quantize(torch.randn(256, 2048, device="cuda").bfloat16(), 64, double_quant=True)
        x = torch.randn(tile.rows, 256 if grad else 2048, device="cuda").bfloat16()
        with setting(tile, split):
            launch(x, w, grad)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def compile_all(contact: Contact, tasks: list[tuple[Tile, int, bool]], processes: int = 15) -> set:
    """Fill Triton's cache; the tasks that compiled."""
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        failures = list(pool.map(_compile, tasks, chunksize=2))
    bad = [(task, why) for task, why in zip(tasks, failures, strict=True) if why]
    contact.row(what="compiled", kernels=len(tasks), failed=len(bad), seconds=time.perf_counter() - start)
    for task, why in bad[:10]:
        contact.row(what="did not compile", tile=str(task), why=why)
    return {task for task, why in zip(tasks, failures, strict=True) if not why}


def run(contact: Contact) -> None:
    """Rows of each setting, and the best of each size."""
    deadline = time.perf_counter() + float(os.environ.get("SWEEP_SECONDS", "80"))
    rows = [1, 8, 16, 32, 64]
    tasks = []
    for m, grad in itertools.product(rows, (False, True)):
        tasks += [(tile, split, grad) for tile in candidates(m, grad) for split in SPLITS]
    tasks = list(dict.fromkeys(tasks))
    good = compile_all(contact, tasks)
    for shape in SHAPES:
        weights = weights_of(shape, contact.device)
        for m, grad in itertools.product(rows, (False, True)):
            if time.perf_counter() > deadline:
                contact.row(what="stopped", why="out of time")
                return
            own = [(tile, split) for tile in candidates(m, grad) for split in SPLITS if (tile, split, grad) in good]
            _sweep(contact, shape, m, grad, weights, own)


def _sweep(
    contact: Contact, shape: tuple[int, int], m: int, grad: bool, weights: Weights, settings: list[tuple[Tile, int]]
) -> None:
    x = torch.randn(m, shape[0] if grad else shape[1], device=contact.device).bfloat16()
    right = launch(x, weights.packed[0], grad)
    shipped = Graph([lambda w=w: launch(x, w, grad) for w in weights.packed])
    times = []
    for tile, split in settings:
        try:
            with setting(tile, split):
                error = distance(launch(x, weights.packed[0], grad), right.double())
                graph = Graph([lambda w=w: launch(x, w, grad) for w in weights.packed])
            us = 1e6 * min(graph.seconds() for _ in range(3))
            graph.free()
        except Exception as failure:
            contact.row(what="failed", shape=shape, rows=m, grad=grad, tile=str(tile), why=str(failure)[:200])
            continue
        times.append((us, split, tile, error))
    shipped_us = 1e6 * min(shipped.seconds() for _ in range(3))
    times.sort(key=lambda t: t[0])
    with (contact.folder / "sweep.jsonl").open("a") as file:
        import json

        for us, split, tile, error in times:
            file.write(json.dumps([shape, m, grad, us, split, vars(tile), error]) + "\n")
    best = [f"{us:.2f} us: {t.kernel} {t.rows}x{t.bn}x{t.nb} warps {t.warps} stages {t.stages} split {s} ({e:.1e})"
            for us, s, t, e in times[:4]]
    contact.row(what="sweep", shape=shape, rows=m, grad=grad, shipped=shipped_us, tried=len(times), best=best)

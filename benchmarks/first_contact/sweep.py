"""Every tile and division of the work that could be better than the shipped one, timed beside it.

An emulator counts instructions; what a GPU makes of them shows here alone. Each setting's result is compared with the
shipped setting's. Compiling goes ahead in several processes, of which each launches small products.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.first_contact import clock
from benchmarks.first_contact.products import SHAPES, TINY, Weights, weights_of
from benchmarks.first_contact.record import Contact
from benchmarks.harness import describe, distance
from minipeft.nf4 import NF4Weight
from minipeft_kernels.linear import gpu
from minipeft_kernels.linear.tiles import Tile
from minipeft_kernels.nf4 import dequantize_triton

FILE = "sweep.jsonl"
SPLITS = (4, 8, 16, 2)
ROWS = (1, 16, 32, 64, 128)
# A tile that is so much slower than the best one in its first two divisions is left.
HOPELESS = 1.4
WORST_ERROR = 0.05
Setting = tuple[Tile, bool]


def candidates(rows: int, grad: bool) -> list[Tile]:
    """Tiles that so many rows could take."""
    tiles = []
    bm = min(64, max(8, 1 << (rows - 1).bit_length()))
    if not grad and bm <= 32:
        for (bn, warps), nb, stages in itertools.product(((32, 1), (64, 2)), (2, 4), (2, 3)):
            tiles.append(Tile("direct", bm, bn, nb, warps, stages))
    if grad or bm >= 32:
        for (bn, warps), stages in itertools.product(((64, 2), (64, 4), (128, 4), (128, 8)), (2, 3, 4)):
            tiles.append(Tile("staged", bm, bn, 1, warps, stages))
    if rows >= 128:
        for bn, warps in ((64, 4), (128, 8)):
            tiles.append(Tile("staged", 128, bn, 1, warps, 3))
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


def compile_one(task: Setting) -> str:
    """Launch it once; what it raised."""
    tile, grad = task
    try:
        w = NF4Weight.quantize(torch.randn(256, 2048, device="cuda").bfloat16(), 64, double_quant=True)
        x = torch.randn(tile.rows, 256 if grad else 2048, device="cuda").bfloat16()
        with setting(tile, 2):
            launch(x, w, grad)
        torch.cuda.synchronize()
    # The machine's refusal is the finding.
    except Exception as error:
        return describe(error)
    return ""


def compile_all(
    contact: Contact, tasks: list[Any], processes: int = 15, one: Callable[[Any], str] = compile_one
) -> set[Any]:
    """Fill Triton's cache; the tasks that compiled. `one` launches a task's kernel once, and says what it raised."""
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        failures = list(pool.map(one, tasks, chunksize=2))
    bad = [(task, why) for task, why in zip(tasks, failures, strict=True) if why]
    contact.row(what="compiled", kernels=len(tasks), failed_kernels=len(bad), seconds=time.perf_counter() - start)
    for task, why in bad[:10]:
        contact.row(what="did not compile", tile=str(task), why=why)
    return {task for task, why in zip(tasks, failures, strict=True) if not why}


def run(contact: Contact, seconds: float | None = None) -> None:
    """Rows of the best settings of each size; all of them in a file of their own.

    Args:
        seconds: after which no further size is begun; None for what SWEEP_SECONDS says.
    """
    gc.collect()
    gc.freeze()
    deadline = time.perf_counter() + (seconds or float(os.environ.get("SWEEP_SECONDS", "80")))
    shapes, rows = (TINY[0], TINY[1]) if contact.pretend else (SHAPES, ROWS)
    pairs = list(itertools.product(rows, (False, True)))
    tasks = list(dict.fromkeys((tile, grad) for m, grad in pairs for tile in candidates(m, grad)))
    # Pretending, a few are tried, and compiled as they come.
    good = set(tasks[::20]) if contact.pretend else compile_all(contact, tasks)
    for shape in shapes:
        weights = weights_of(shape, contact.device)
        if not contact.pretend:
            _dequantize(contact, shape, weights)
        for m, grad in pairs:
            if time.perf_counter() > deadline:
                contact.row(what="stopped", why="out of time")
                return
            _sweep(contact, shape, m, grad, weights, [tile for tile in candidates(m, grad) if (tile, grad) in good])
        del weights
        if not contact.pretend:
            torch.cuda.empty_cache()


def _sweep(contact: Contact, shape: tuple[int, int], m: int, grad: bool, weights: Weights, tiles: list[Tile]) -> None:
    x = torch.randn(m, shape[0] if grad else shape[1], device=contact.device).bfloat16()
    right = (x.double() @ (weights.exact if grad else weights.exact.T)).float().double()
    product = gpu.input_gradient if grad else (lambda x, w, u, d: gpu.forward(x, w, None, u, d))
    shipped = 1e6 * _time(lambda w: product(x, w.packed(), None, torch.bfloat16), weights)
    decoded = 1e6 * _time_unfused(x, grad, weights)
    found: list[tuple[float, int, Tile, float]] = []
    best = float("inf")
    for tile in tiles:
        own = float("inf")
        for i, split in enumerate(SPLITS):
            if i >= 2 and own > HOPELESS * best:
                break
            try:
                with setting(tile, split):
                    error = distance(launch(x, weights.packed[0], grad), right)
                    us = 1e6 * _time(lambda w: launch(x, w, grad), weights)
            except Exception as failure:
                contact.row(
                    what="setting failed", shape=shape, rows=m, grad=grad, tile=str(tile), why=str(failure)[:200]
                )
                break
            found.append((us, split, tile, error))
            if error > WORST_ERROR:
                contact.row(what="setting", shape=shape, rows=m, tile=str(tile), split=split, error=error, right=False)
                continue
            own, best = min(own, us), min(best, us)
    found.sort(key=lambda t: t[0])
    with (contact.folder / FILE).open("a") as file:
        for us, split, tile, error in found:
            row: dict[str, Any] = {"shape": shape, "rows": m, "grad": grad, "us": us, "split": split, "error": error}
            row["decoded"] = decoded
            file.write(json.dumps(row | {"tile": asdict(tile)}) + "\n")
    lines = [f"{us:.2f} us: {_name(tile)} split {split} ({error:.1e})" for us, split, tile, error in found[:4]]
    contact.row(
        what="sweep", shape=shape, rows=m, grad=grad, shipped=shipped, decoded=decoded, tried=len(found), best=lines
    )


def _time(call: Any, weights: Weights) -> float:
    return clock.best([lambda w=w: call(w) for w in weights.packed])  # type: ignore[misc]


def _time_unfused(x: torch.Tensor, grad: bool, weights: Weights) -> float:
    with patch.object(gpu, "is_fused", lambda *a: False):
        if grad:
            return _time(lambda w: gpu.input_gradient(x, w.packed(), None, torch.bfloat16), weights)
        return _time(lambda w: gpu.forward(x, w.packed(), None, None, torch.bfloat16), weights)


def _name(tile: Tile) -> str:
    return f"{tile.kernel} {tile.rows}x{tile.bn}x{tile.nb} warps {tile.warps} stages {tile.stages}"


def _dequantize(contact: Contact, shape: tuple[int, int], weights: Weights) -> None:
    times = []
    for columns, rows in itertools.product((32, 64), (64, 128, 256)):
        with patch.multiple(dequantize_triton, COLUMNS=columns, ROWS=rows):
            times.append((1e6 * _time(lambda w: w.dequantize(torch.bfloat16), weights), columns, rows))
    lines = [f"{us:.2f} us: {c} columns, {r} rows" for us, c, r in sorted(times)]
    contact.row(what="dequantize", shape=shape, best=lines)

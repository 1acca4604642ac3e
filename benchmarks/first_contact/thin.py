"""Every tile and division of LoRA's small products that could be better than the shipped one, timed beside it.

The products are those of a layer of Llama-3-8B's shape with rank 16 and float32 factors: x A^T and dy B, which sum over
a row, and x^T g and dy^T low, which sum over all rows.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.first_contact import clock
from benchmarks.first_contact.record import Contact
from benchmarks.first_contact.sweep import compile_all
from benchmarks.harness import describe, distance
from minipeft_kernels.dispatch import multiprocessors
from minipeft_kernels.linear import thin_triton
from minipeft_kernels.linear.thin_triton import Tile, product

FILE = "sweep-thin.jsonl"
RANK = 16
ROWS = (2048, 256)
COLUMNS = (4096, 14336, 1024)
WORST_ERROR = 1e-5
SECONDS = 60.0
Setting = tuple[Tile, bool]


def candidates() -> list[Tile]:
    """Tiles that could be taken."""
    sizes = (128, 64, 4), (128, 64, 8), (64, 64, 2), (64, 64, 4), (64, 128, 4), (32, 64, 2), (32, 128, 2), (16, 64, 2)
    return [Tile(rows, depth, RANK, warps, 3) for rows, depth, warps in sizes]


def splits(tile: Tile, rows: int, columns: int, over_rows: bool, multiprocessors: int) -> list[int]:
    """Parts: what the rule says, half and twice as many."""
    width, depth = (columns, rows) if over_rows else (rows, columns)
    said = thin_triton.split_for(-(-width // tile.rows), tile, depth, multiprocessors)
    most = -(-depth // tile.depth)
    return [split for split in dict.fromkeys((said, said // 2, 2 * said)) if 0 < split <= most]


def launch(x: Tensor, factor: Tensor, out: Tensor, over_rows: bool, tile: Tile, split: int) -> None:
    """The product by this tile, its programs in `split` parts; the plan is found anew, and compiled kernels are not."""
    with (
        patch.object(thin_triton, "tile_for", lambda *a: tile),
        patch.object(thin_triton, "split_for", lambda *a: split),
        patch.object(thin_triton, "_planned", thin_triton._planned.__wrapped__),
    ):
        product(x, factor, torch.float32, out, 1.0, over_rows)


def operands(rows: int, columns: int, over_rows: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, F and room for the product."""
    x = torch.randn(rows, columns, device=device).bfloat16()
    factor = torch.randn(rows, RANK, device=device) if over_rows else torch.randn(RANK, columns, device=device).T
    return x, factor, torch.empty(columns if over_rows else rows, RANK, device=device)


def compile_one(task: Setting) -> str:
    """Launch it once; what it raised."""
    tile, over_rows = task
    try:
        launch(*operands(256, 1024, over_rows, "cuda"), over_rows, tile, 2)
        torch.cuda.synchronize()
    # The machine's refusal is the finding.
    except Exception as error:
        return describe(error)
    return ""


def run(contact: Contact) -> None:
    """A row for each product with its best settings; all of them in a file of their own."""
    gc.collect()
    gc.freeze()
    deadline = time.perf_counter() + SECONDS
    tasks = list(itertools.product(candidates(), (False, True)))
    good = set(tasks[::5]) if contact.pretend else compile_all(contact, tasks, one=compile_one)
    rows, columns = ((64,), (128,)) if contact.pretend else (ROWS, COLUMNS)
    for m, k, over_rows in itertools.product(rows, columns, (False, True)):
        if time.perf_counter() > deadline:
            contact.row(what="stopped", why="out of time")
            return
        _sweep(contact, m, k, over_rows, [tile for tile, over in tasks if over == over_rows and (tile, over) in good])


def _sweep(contact: Contact, rows: int, columns: int, over_rows: bool, tiles: list[Tile]) -> None:
    copies = 1 if contact.pretend else clock.copies_for(2 * rows * columns)
    sets = [operands(rows, columns, over_rows, contact.device) for _ in range(copies)]
    x, factor, out = sets[0]
    right = (x.double().T if over_rows else x.double()) @ factor.double()
    shipped = _time([lambda o=o: product(o[0], o[1], torch.float32, o[2], 1.0, over_rows) for o in sets])  # type: ignore[misc]
    wide = _time([lambda o=o: (o[0].float().T if over_rows else o[0].float()) @ o[1] for o in sets])  # type: ignore[misc]
    rounded = _time([lambda o=o: (o[0].T if over_rows else o[0]) @ o[1].bfloat16() for o in sets])  # type: ignore[misc]
    found: list[tuple[float, int, Tile, float]] = []
    for tile in tiles:
        for split in splits(tile, rows, columns, over_rows, multiprocessors(x.device)):
            out.fill_(float("nan"))
            launch(*sets[0], over_rows, tile, split)
            error = distance(out, right)
            if not error <= WORST_ERROR:
                contact.row(what="setting", rows=rows, columns=columns, tile=str(tile), split=split, right=False)
                continue
            us = _time([lambda o=o, t=tile, s=split: launch(*o, over_rows, t, s) for o in sets])  # type: ignore[misc]
            found.append((us, split, tile, error))
    found.sort(key=lambda t: t[0])
    size = {"rows": rows, "columns": columns, "over_rows": over_rows}
    with (contact.folder / FILE).open("a") as file:
        for us, split, tile, error in found:
            row: dict[str, Any] = {**size, "us": us, "split": split, "error": error, "tile": asdict(tile)}
            file.write(json.dumps(row) + "\n")
    lines = [
        f"{us:.2f} us: {t.rows}x{t.depth} warps {t.warps} stages {t.stages} split {s}" for us, s, t, _ in found[:5]
    ]
    others = {"shipped": shipped, "in float32": wide, "in bfloat16": rounded}
    contact.row(what="thin", **size, **others, tried=len(found), best=lines)


def _time(calls: list[Any]) -> float:
    return 1e6 * clock.best(calls)

"""`minipeft bench --tune`: the tiles that this machine's GPU runs fastest, chosen by a sweep and kept in a file.

`choose` is the choice alone, from the rows of a sweep to a table.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import triton

from benchmarks.first_contact import sweep
from benchmarks.first_contact.record import Contact
from benchmarks.options import BenchError
from minipeft_kernels.dispatch import capability, multiprocessors
from minipeft_kernels.linear.gpu import grid_of
from minipeft_kernels.linear.tables import Table, gpu_name, write_table
from minipeft_kernels.linear.tiles import CHUNK, Tile, fused_max_rows, split_for

SECONDS = 240.0
FILLS = range(1, 33)
Shape = tuple[int, int]
# Microseconds of one tile, by shape and division.
Times = dict[Shape, dict[int, float]]


def tune(seconds: float | None, folder: Path | None, command: str) -> Path:
    """Sweep on the current GPU for so many seconds (None for 240), and write its table: the file's path.

    Args:
        folder: for the table and the sweep's rows; None for where products find the table, and the rows are not kept.

    Raises:
        BenchError: there is no NVIDIA GPU, or the time did not suffice.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise BenchError("--tune times the kernels on an NVIDIA GPU, and this PyTorch sees none: run it where one is")
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{gpu_name(device)}: every tile that could be better than the shipped one", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        rows_folder = folder or Path(temporary)
        rows_folder.mkdir(parents=True, exist_ok=True)
        # Rows of an earlier sweep would be read as this one's.
        (rows_folder / sweep.FILE).unlink(missing_ok=True)
        sweep.run(Contact(rows_folder, "sweep"), seconds or SECONDS)
        file = rows_folder / sweep.FILE
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    measured = {"torch": torch.__version__, "triton": triton.__version__, "command": command}
    measured["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    limit = fused_max_rows(capability(device), wide=False)
    table = choose(rows, gpu_name(device), measured, multiprocessors(device), limit)
    return write_table(table, folder)


def choose(
    rows: Iterable[Mapping[str, Any]], gpu: str, measured: Mapping[str, str], multiprocessors: int, limit: int | None
) -> Table:
    """The table that a sweep's rows speak for.

    For each number of rows and direction the tile whose geometric mean over the shapes, each at its best division, is
    the lowest; then the `fill` with which `split_for` loses least of that. Settings whose result was wrong do not
    count, nor tiles that were not timed for every shape that others were timed for.

    Args:
        rows: of sweep.jsonl. gpu, measured: for the table. multiprocessors: of the GPU.
        limit: most rows for fused kernels by the built-in rules. It stays where the sweep, which ends at 128 rows,
            found no number at which fused kernels lose, unless it is smaller than what the sweep found.

    Raises:
        BenchError: a number of rows was not timed for any shape.
    """
    timed, decoded = _times(rows)
    if missing := [(m, grad) for m in sweep.ROWS for grad in (False, True) if not timed[m, grad]]:
        m, grad = missing[0]
        way = "input gradient" if grad else "forward"
        raise BenchError(f"the sweep has no right result for {m} rows, {way}: give it more time with --seconds")
    tiles: dict[bool, list[Tile]] = {False: [], True: []}
    best: dict[tuple[int, bool], Times] = {}
    for m, grad in sorted(timed):
        tile, times = _best_tile(timed[m, grad])
        best[m, grad] = times
        tile = replace(tile, fill=_best_fill(tile, times, m, grad, multiprocessors))
        # For more rows no larger tile than before may win: then the one before serves them, being the last.
        if not tiles[grad] or tile.rows > tiles[grad][-1].rows:
            tiles[grad].append(tile)
    return Table(gpu, measured, tuple(tiles[False]), tuple(tiles[True]), _fused_up_to(best, decoded, limit))


def divisions_loss(tile: Tile, times: Times, m: int, grad: bool, multiprocessors: int) -> float:
    """The geometric mean over shapes of the time with the division that `split_for` takes, over the best one's.

    A division that nobody timed counts as the slowest one that was.
    """
    return geometric_mean(
        own.get(_split(tile, shape, m, grad, multiprocessors), max(own.values())) / min(own.values())
        for shape, own in times.items()
    )


def _split(tile: Tile, shape: Shape, m: int, grad: bool, multiprocessors: int) -> int:
    n, k = shape
    tiles, steps = grid_of(tile, -(-m // tile.rows), n, k // CHUNK, grad)
    return split_for(tiles, steps, m, n if grad else k, tile, multiprocessors)


def _times(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[Any, dict[Tile, Times]], dict[Any, dict[Shape, float]]]:
    """By (rows, gradient): what each tile took, and what decoding and the vendor's product took where that is known."""
    timed: dict[Any, dict[Tile, Times]] = defaultdict(dict)
    decoded: dict[Any, dict[Shape, float]] = defaultdict(dict)
    for row in rows:
        key, shape = (row["rows"], row["grad"]), (row["shape"][0], row["shape"][1])
        if "decoded" in row:
            decoded[key][shape] = row["decoded"]
        # "not above", since a result of NaN is above nothing.
        if not row["error"] <= sweep.WORST_ERROR:
            continue
        tile = Tile(**{**row["tile"], "fill": Tile.fill})
        own = timed[key].setdefault(tile, {}).setdefault(shape, {})
        own[row["split"]] = min(row["us"], own.get(row["split"], row["us"]))
    return timed, decoded


def _best_tile(timed: Mapping[Tile, Times]) -> tuple[Tile, Times]:
    shapes = {shape for times in timed.values() for shape in times}
    whole = {tile: times for tile, times in timed.items() if set(times) == shapes}
    if not whole:
        raise BenchError("no tile was timed for every shape: give the sweep more time with --seconds")
    tile = min(whole, key=lambda tile: geometric_mean(min(own.values()) for own in whole[tile].values()))
    return tile, whole[tile]


def _best_fill(tile: Tile, times: Times, m: int, grad: bool, multiprocessors: int) -> int:
    losses = {fill: divisions_loss(replace(tile, fill=fill), times, m, grad, multiprocessors) for fill in FILLS}
    equal = [fill for fill in FILLS if losses[fill] == min(losses.values())]
    # The middle: furthest from where another shape of nearly the same size would be divided otherwise.
    return equal[(len(equal) - 1) // 2]


def _fused_up_to(
    best: Mapping[tuple[int, bool], Times], decoded: Mapping[Any, Mapping[Shape, float]], limit: int | None
) -> int | None:
    if any(set(times) - set(decoded.get(key, ())) for key, times in best.items()):
        return limit
    most = 0
    for m in sorted({m for m, _ in best}):
        ratios = [
            geometric_mean(min(own.values()) / decoded[m, grad][shape] for shape, own in best[m, grad].items())
            for grad in (False, True)
        ]
        if max(ratios) > 1:
            return most
        most = m
    return None if limit is None else max(limit, most)

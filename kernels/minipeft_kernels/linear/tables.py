"""Tables that a GPU itself chose, in files, instead of the rules of `tiles`.

`minipeft bench --tune` writes `tuned/<name of the GPU>.json` in this folder; products on a GPU of that name take its
tiles and its number of rows up to which fused kernels win. float32 keeps the rules of `tiles`, for no sweep times it.
A file that says what no kernel can run is refused by an error that names it: nothing is replaced in silence.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .tiles import SMALLEST_ROWS, Tile

FOLDER = Path(__file__).with_name("tuned")
MOST_BYTES = 1 << 20
MEASURED = ("torch", "triton", "date", "command")
# What each number of a tile may be. More rows, warps or stages than these no GPU holds; Triton takes powers of two.
_POWERS = {"rows": (SMALLEST_ROWS, 256), "bn": (16, 256), "nb": (1, 8), "warps": (1, 16)}
_RANGES = {"stages": (1, 8), "fill": (1, 64)}


@dataclass(frozen=True, eq=False)
class Table:
    """The choice of one kind of GPU. No two are equal: plans of launches are kept by the table that they come from.

    Attributes:
        gpu: its name, as `torch.cuda.get_device_name` has it.
        measured: what with: the releases of torch and triton, the date, the command.
        forward, input_grad: the tiles, ascending in rows.
        fused_max_rows: rows up to which the fused kernels win; None for any number.
    """

    gpu: str
    measured: Mapping[str, str]
    forward: tuple[Tile, ...]
    input_grad: tuple[Tile, ...]
    fused_max_rows: int | None


def slug(gpu: str) -> str:
    """A GPU's name in a file name: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@functools.cache
def table_on(device: torch.device) -> Table | None:
    """The table of a device's kind of GPU; None where there is none. Read once: `forget` has it read again.

    Raises:
        ValueError: as `read_table`.
    """
    name = gpu_name(device)
    file = FOLDER / f"{slug(name)}.json"
    return read_table(file, name) if name and file.is_file() else None


def forget() -> None:
    """Have the next product look for its table again."""
    table_on.cache_clear()


def gpu_name(device: torch.device) -> str:
    """The name of a GPU that PyTorch calls CUDA, else ""."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""


def read_table(file: Path, gpu: str) -> Table:
    """The table in a file, for the GPU of that name.

    Raises:
        ValueError: it is no such table, or of another GPU; names the file, the value and what was expected.
    """
    values = _object(_json(file), tuple(f.name for f in fields(Table)), str(file))
    if values["gpu"] != gpu:
        raise _error(f"{file}: gpu", repr(gpu), values["gpu"])
    measured = _object(values["measured"], MEASURED, f"{file}: measured")
    for name, text in measured.items():
        if not isinstance(text, str):
            raise _error(f"{file}: measured: {name}", "text", text)
    most = values["fused_max_rows"]
    if most is not None:
        _whole(most, 0, 1 << 24, f"{file}: fused_max_rows", "null for any number, or ")
    forward, input_grad = (_tiles(values[name], f"{file}: {name}") for name in ("forward", "input_grad"))
    for i, tile in enumerate(input_grad):
        if tile.kernel != "staged":
            raise _error(f"{file}: input_grad: tile {i}: kernel", "'staged', which alone has a gradient", tile.kernel)
    return Table(gpu, measured, forward, input_grad, most)


def write_table(table: Table, folder: Path | None = None) -> Path:
    """Write a table where `table_on` finds it, or into another folder, and have it read again: the file's path.

    The file is whole at every moment: it is written beside, and then renamed.

    Raises:
        ValueError: the table holds what `read_table` would refuse; nothing is left behind then.
    """
    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{slug(table.gpu)}.json"
    text = json.dumps(asdict(table), indent=1) + "\n"
    handle, name = tempfile.mkstemp(dir=folder, prefix=f"{file.stem}-", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "w") as opened:
            opened.write(text)
        part.chmod(0o644)
        read_table(part, table.gpu)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    forget()
    return file


def _json(file: Path) -> Any:
    with file.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{file} is larger than {MOST_BYTES:,} bytes, and a table of tiles is not: {_REMEDY}")
    try:
        return json.loads(content.decode())
    # Undecodable bytes, broken JSON, numbers of thousands of digits; nesting without end.
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file} is not valid JSON ({str(problem)[:200]}): {_REMEDY}") from None


_REMEDY = "mend it, or delete it and write it anew with `minipeft bench --tune`"


def _error(where: str, expected: str, got: object) -> ValueError:
    shown = repr(got)
    return ValueError(f"{where} must be {expected}, got {shown[:100]}{'...' * (len(shown) > 100)}: {_REMEDY}")


def _object(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """`value`, if it is an object of exactly these names."""
    if not isinstance(value, dict) or set(value) != set(names):
        got = sorted(value) if isinstance(value, dict) else value
        raise _error(where, f"an object of {', '.join(names)}", got)
    return value


def _whole(value: Any, least: int, most: int, where: str, or_else: str = "", power: bool = False) -> None:
    """Raise unless `value` is a whole number within bounds, and a power of two if it must be."""
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    if not fits or (power and value & (value - 1)):
        kind = "a power of two" if power else "a whole number"
        raise _error(where, f"{or_else}{kind} from {least} to {most}", value)


def _tiles(values: Any, where: str) -> tuple[Tile, ...]:
    if not isinstance(values, list) or not values:
        raise _error(where, "a list of tiles, one at least", values)
    found: list[Tile] = []
    for i, value in enumerate(values):
        here = f"{where}: tile {i}"
        tile = _object(value, tuple(f.name for f in fields(Tile)), here)
        if tile["kernel"] not in ("direct", "staged"):
            raise _error(f"{here}: kernel", "'direct' or 'staged'", tile["kernel"])
        for name, (least, most) in _POWERS.items():
            _whole(tile[name], least, most, f"{here}: {name}", power=True)
        for name, (least, most) in _RANGES.items():
            _whole(tile[name], least, most, f"{here}: {name}")
        if tile["kernel"] == "staged" and tile["nb"] != 1:
            raise _error(f"{here}: nb", "1 for 'staged'", tile["nb"])
        if found and tile["rows"] <= found[-1].rows:
            raise _error(f"{here}: rows", f"more than the tile's before it, {found[-1].rows}", tile["rows"])
        found.append(Tile(**tile))
    return tuple(found)

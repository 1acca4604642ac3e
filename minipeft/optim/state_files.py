"""Optimizer state in a safetensors file, written and read page by page.

The format needs to know all shapes before the first byte of data, and they are known. A page holds parts of several
tensors, so each part is written where it belongs in the file; the file takes its name when it is whole.

    "<i>.step", "<i>.exp_avg", "<i>.exp_avg_sq"    i: the parameter's number in a state dict
    metadata: {"format": "pt", "optimizer": '{"format": 1, "param_groups": [...]}'}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minipeft.files import atomic_path
from minipeft.optim.paged_state import PagedState
from minipeft.optim.state_dicts import field_shape

FORMAT = 1
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}

# By number in the pages: number in the state dict, shape, steps taken.
Numbers = Mapping[int, tuple[int, torch.Size, int]]


def save_states(path: str | Path, pages: PagedState, numbers: Numbers, groups: list[dict[str, Any]]) -> None:
    """Write the states of numbered parameters, atomically."""
    fields = pages.table.layout.fields
    header, offsets = _header(pages, numbers, groups)
    with atomic_path(path) as temporary, open(temporary, "r+b") as file:
        file.write(header)
        for index, _, step in numbers.values():
            _write_at(file.fileno(), len(header) + offsets[f"{index}.step"], struct.pack("<f", step))
        for segments in pages.sweep(numbers):
            for segment, views in segments:
                for field, view in zip(fields, views, strict=True):
                    start = offsets[f"{numbers[segment.parameter][0]}.{field.name}"]
                    start += segment.start // field.per * field.dtype.itemsize
                    _write_at(file.fileno(), len(header) + start, view.cpu().numpy().tobytes())


@contextlib.contextmanager
def load_states(path: str | Path) -> Iterator[dict[str, Any]]:
    """What `save_states` wrote as a state dict, whose tensors are read when they are used.

    Raises:
        ValueError: no such file, a damaged one, or one of something else.
    """
    try:
        # A file that is shorter or longer than its header says is refused here.
        file = safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"optimizer state {path} is missing or damaged: {error}") from None
    with file:
        try:
            described = json.loads((file.metadata() or {})["optimizer"])
            known, groups = described["format"] == FORMAT, described["param_groups"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} does not hold the state of an optimizer") from None
        if not known:
            raise ValueError(f"{path} is of format {described['format']}, this version reads format {FORMAT}")
        state: dict[int, dict[str, Any]] = {}
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = file.get_tensor(key)
        for group in groups:
            group["betas"] = tuple(group["betas"])
        yield {"state": state, "param_groups": groups}


def _header(pages: PagedState, numbers: Numbers, groups: list[dict[str, Any]]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where after them the data of each tensor begins."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for index, shape, _ in numbers.values():
        entries[f"{index}.step"] = (torch.float32, ())
        for field in pages.table.layout.fields:
            entries[f"{index}.{field.name}"] = (field.dtype, field_shape(field, shape))
    # A learning rate may be a tensor.
    text = json.dumps({"format": FORMAT, "param_groups": groups}, default=float)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "optimizer": text}}
    offsets, end = {}, 0
    # Wide dtypes first, so that every tensor is aligned.
    for key, (dtype, sizes) in sorted(entries.items(), key=lambda entry: -entry[1][0].itemsize):
        offsets[key] = end
        end += math.prod(sizes) * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": list(sizes), "data_offsets": [offsets[key], end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, offsets


def _write_at(handle: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count

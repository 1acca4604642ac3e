"""State as torch's optimizers give and take it: a dict of tensors by parameter.

Of 32 bits it is what torch.optim.AdamW has: "step", "exp_avg", "exp_avg_sq". Of 8 bits the moments are given as they
are stored, in codes and scales, since decoding and encoding again would not give the same codes back; to make of it a
state for torch.optim.AdamW, load it into a PagedAdamW of 32 bits.

In a file the same tensors lie under these names, written and read page by page:

    "<i>.step", "<i>.exp_avg", "<i>.exp_avg_sq"    i: the parameter's number in a state dict
    metadata: {"format": "pt", "optimizer": '{"format": 1, "param_groups": [...]}'}
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minipeft.files import atomic_path
from minipeft.optim.checks import check_group, parameter_name
from minipeft.optim.pages import LAYOUTS, Segment
from minipeft.optim.parameter_state import ParameterState, field_shape, part
from minipeft.optim.state import PagedState, Views
from minipeft.shards import is_sharded, part_of, whole
from minipeft.stored import brief, shown
from minipeft_kernels.adamw.eight_bit import dequantize_state, quantize_state

KEYS = {bits: [field.name for field in layout.fields] for bits, layout in LAYOUTS.items()}

FORMAT = 1
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}

# By number in the pages: number in the state dict, shape, steps taken.
Numbers = Mapping[int, tuple[int, torch.Size, int]]


def write_states(pages: PagedState, states: Mapping[int, Mapping[str, Any]], stale: set[int]) -> None:
    """Give the numbered parameters these states, whole or some of their fields, and the `stale` ones zeros."""
    numbers = states.keys() | stale
    if not numbers:
        return
    with pages.all_or_nothing():
        for segments in pages.sweep(numbers):
            for segment, views in segments:
                state = states.get(segment.parameter)
                if state is None:
                    for view in views:
                        view.zero_()
                else:
                    _write(pages, segment, views, state)


def _write(pages: PagedState, segment: Segment, views: Views, state: Mapping[str, Tensor]) -> None:
    fields = pages.table.layout.fields
    if any(field.name in state for field in fields):
        for field, view in zip(fields, views, strict=True):
            if field.name in state:
                view.copy_(part(field, state[field.name], segment))
        return
    if fields == LAYOUTS[8].fields:
        wide = [part(field, state[field.name], segment).to(views[0].device).float() for field in LAYOUTS[32].fields]
        quantize_state(wide[0], views[0], views[1], signed=True)
        quantize_state(wide[1], views[2], views[3], signed=False)
        return
    # Blocks that share a scale may begin before the segment does.
    first = segment.start % LAYOUTS[8].quantum
    blocks = dataclasses.replace(segment, start=segment.start - first)
    m_codes, m_scales, v_codes, v_scales = (
        part(field, state[field.name], blocks).to(views[0].device) for field in LAYOUTS[8].fields
    )
    views[0].copy_(dequantize_state(m_codes, m_scales, signed=True)[first:])
    views[1].copy_(dequantize_state(v_codes, v_scales, signed=False)[first:])


def merged_groups(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups with the settings of a state dict.

    Raises:
        ValueError: other numbers of groups or of parameters in one, or settings that are not supported.
    """
    try:
        saved = state_dict["param_groups"]
        counts = [len(group["params"]) for group in saved]
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not the state dict of an optimizer: no {error}") from None
    ours = [len(group["params"]) for group in groups]
    if counts != ours:
        raise ValueError(f"the state is of parameter groups of {counts} parameters, the optimizer has {ours}")
    merged = []
    for group, other in zip(groups, saved, strict=True):
        settings = {key: copy.deepcopy(value) for key, value in other.items() if key != "params"}
        merged.append({**group, **settings, "params": group["params"]})
        check_group(merged[-1])
    return merged


def checked_states(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> dict[Tensor, Mapping[str, Any]]:
    """The states in a state dict, by parameter: by position, as torch does it.

    Raises:
        ValueError: one does not fit its parameter; names it.
    """
    states: dict[Tensor, Mapping[str, Any]] = {}
    given = dict(state_dict.get("state", {}))
    for number, (group, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            state = given.pop(key, None)
            if state:
                check_state(state, p, parameter_name(group, number, index))
                states[p] = state
    if given:
        raise ValueError(f"the state has entries for parameters that are in none of its groups: {sorted(given)}")
    return states


def check_state(state: Mapping[str, Any], p: Tensor, name: str) -> None:
    """Raise ValueError, with the parameter's name, for entries that are missing, not known, or do not fit `p`.

    What an optimizer's own state has in its pages is not looked at.
    """
    bits = next((bits for bits, keys in KEYS.items() if set(state) == {"step", *keys}), None)
    if bits is None:
        found, expected = (
            ", ".join(sorted(map(str, state))),
            " or ".join(", ".join(["step", *k]) for k in KEYS.values()),
        )
        hint = " (amsgrad is not supported)" if "max_exp_avg_sq" in state else ""
        raise ValueError(f"the state of {name} must have the entries {expected}, and has {found}{hint}")
    values = state.outside() if isinstance(state, ParameterState) else state
    if "step" in values:
        step = float(values["step"])
        if step < 0 or step != int(step):
            raise ValueError(f"the state of {name} has step {step}, which must be a whole number")
    for field in LAYOUTS[bits].fields:
        if field.name not in values:
            continue
        value, shape = values[field.name], field_shape(field, p.shape)
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        fits = isinstance(value, Tensor) and value.is_floating_point() == field.dtype.is_floating_point
        if not fits or tuple(value.shape) != shape:
            found = f"{kind} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {kind}"
            raise ValueError(f"{field.name} in the state of {name} must be {field.dtype} {shape}, and is {found}")


def own_state(state: Mapping[str, Any], p: Tensor) -> Mapping[str, Any]:
    """`state`; of a sharded parameter this process's part of each entry, whole or sharded as it may be given."""
    if not is_sharded(p):
        return state
    return {name: value if name == "step" else part_of(value, p) for name, value in state.items()}


def save_states(
    path: str | Path | None,
    pages: PagedState,
    numbers: Numbers,
    groups: list[dict[str, Any]],
    sharded: Iterable[ParameterState] = (),
) -> None:
    """Write the states of numbered parameters to a safetensors file, atomically.

    The format needs to know all shapes before the first byte of data, and they are known. A page holds parts of several
    tensors, so each part is written where it belongs in the file; the file takes its name when it is whole.

    Args:
        path: None in a process that writes nothing, and gives its part of what is sharded.
        sharded: those of the states, of which each process has a part.
    """
    fields, own = pages.table.layout.fields, dict(numbers)
    if path is None:
        for state in sharded:
            for field in fields:
                whole(state.read(field))
        return
    header, offsets = _header(pages, numbers, groups)
    with atomic_path(path) as temporary, open(temporary, "r+b") as file:

        def write(name: str, start: int, data: bytes) -> None:
            _write_at(file.fileno(), len(header) + offsets[name] + start, data)

        file.write(header)
        for index, _, step in numbers.values():
            write(f"{index}.step", 0, struct.pack("<f", step))
        for state in sharded:
            index, _, _ = own.pop(state.number)
            for field in fields:
                write(f"{index}.{field.name}", 0, whole(state.read(field)).cpu().numpy().tobytes())
        for segments in pages.sweep(own):
            for segment, views in segments:
                for field, view in zip(fields, views, strict=True):
                    start = segment.start // field.per * field.dtype.itemsize
                    write(f"{own[segment.parameter][0]}.{field.name}", start, view.cpu().numpy().tobytes())


@contextlib.contextmanager
def load_states(path: str | Path) -> Iterator[dict[str, Any]]:
    """The state dict in a file that `save_states` wrote; its tensors are read when they are used.

    Raises:
        ValueError: no such file, a damaged one, or one of something else.
    """
    try:
        # A file that is shorter or longer than its header says is refused here.
        file = safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"optimizer state {path} is missing or damaged: {brief(str(error))}") from None
    with file:
        try:
            described = json.loads((file.metadata() or {})["optimizer"])
            version, groups = described["format"], described["param_groups"]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(f"{path} does not hold the state of an optimizer") from None
        if version != FORMAT:
            raise ValueError(f"{path} is of format {shown(version)}, this version reads format {FORMAT}")
        state: dict[int, dict[str, Any]] = {}
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            index, _, name = key.partition(".")
            if not (index.isascii() and index.isdecimal() and len(index) < 10):
                raise ValueError(f"{path} holds a tensor {shown(key)}, which is no parameter's state")
            state.setdefault(int(index), {})[name] = file.get_tensor(key)
        try:
            for group in groups:
                group["betas"] = tuple(group["betas"])
        except (TypeError, KeyError, AttributeError):
            raise ValueError(f"{path} holds param_groups that are not those of an optimizer") from None
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

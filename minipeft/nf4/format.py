"""The checkpoint format of an NF4 weight, bitsandbytes' own: the names of its tensors, and the JSON beside them.

X.weight, X.weight.absmax, X.weight.quant_map               codes, scales, levels
X.weight.nested_absmax, X.weight.nested_quant_map           if the scales are quantized themselves
X.weight.quant_state.bitsandbytes__nf4                      uint8 that holds JSON: sizes, dtypes, the offset
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minipeft_kernels.nf4.quantize import WEIGHT_DTYPES

QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"
STATE_NAMES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    QUANT_STATE,
)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name in the JSON: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


WEIGHT_DTYPE_NAMES = {dtype_name(dtype): dtype for dtype in WEIGHT_DTYPES}


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


# The condition that the value of each entry of the JSON must meet.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "quant_type": lambda value: value == "nf4",
    "blocksize": _is_size,
    "dtype": lambda value: isinstance(value, str) and value in WEIGHT_DTYPE_NAMES,
    "shape": lambda value: isinstance(value, list) and all(map(_is_size, value)),
}
_NESTED_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "nested_blocksize": lambda value: _is_size(value) and value > 0,
    "nested_dtype": lambda value: value == "float32",
    "nested_offset": lambda value: type(value) in (int, float) and math.isfinite(value),
}


def entries_as_tensor(entries: Mapping[str, Any], meta: bool) -> Tensor:
    """JSON as uint8; without data for a weight on device meta, whose state serves for names and shapes only."""
    packed = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)
    return packed.to("meta") if meta else packed


def read_entries(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON beside the packed weight `name`, checked.

    Raises ValueError when it is missing, damaged, incomplete, or describes a weight that is not NF4; names the entry.
    """
    if f"{name}.quant_state.bitsandbytes__fp4" in state:
        raise ValueError(f"{name} is in FP4, which minipeft does not read: quantize the model to NF4 instead")
    key = f"{name}.quant_state.bitsandbytes__nf4"
    packed = take(state, key)
    if packed.is_meta:
        raise ValueError(f"{key} has no data (device meta): it says how the weight is packed, and is needed")
    try:
        entries = json.loads(bytes(packed.tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key} should hold JSON as uint8, and does not: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{key} should hold a JSON object, and holds {entries!r}")
    double = "nested_offset" in entries or f"{name}.nested_absmax" in state
    needed = _ENTRIES | _NESTED_ENTRIES if double else _ENTRIES
    if missing := sorted(needed.keys() - entries.keys()):
        raise ValueError(f"{key} lacks {', '.join(missing)}: it has {', '.join(entries)}")
    for entry, value in entries.items():
        # An entry of a later version passes while it asks for nothing.
        supports = (_ENTRIES | _NESTED_ENTRIES).get(entry, lambda value: value is None)
        if not supports(value):
            raise ValueError(f"{key} has {entry} = {value!r}, which minipeft does not support")
    return entries


def take(
    state: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None, shape: tuple[int, ...] = ()
) -> Tensor:
    """The tensor `name` of `state`, of this dtype and shape if a dtype is given.

    Raises ValueError when it is missing or does not fit.
    """
    if name not in state:
        raise ValueError(f"{name} is missing from the state of an NF4 weight")
    if dtype is not None:
        check(name, state[name], dtype, shape)
    return state[name]


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor called `name` has this dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} should be {dtype_name(dtype)} {shape}, and is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        )

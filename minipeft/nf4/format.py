"""NF4 weights in checkpoints as bitsandbytes and transformers write them: the tensors' names, and the JSON beside them.

Whatever is read is checked: a missing tensor, one of another dtype or shape, and an entry that asks for something else
are ValueErrors that name it.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minipeft.stored import brief, is_finite, parse_json, shown
from minipeft_kernels.nf4.checks import WEIGHT_DTYPES, check_blocksize

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
    """The name of a dtype in the JSON: "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


STORED_DTYPES = (*WEIGHT_DTYPES, torch.float64)
"""The dtypes that a packed weight may stand for: those it is made of, and that of a model cast to float64."""

_DTYPES = {dtype_name(dtype): dtype for dtype in STORED_DTYPES}


def write_entries(entries: dict[str, Any], device: torch.device) -> Tensor:
    """The JSON of `entries` as uint8: on device meta for a weight on meta, else on the CPU."""
    packed = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)
    return packed.to("meta") if device.type == "meta" else packed


def read_fields(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """The fields of the `NF4Weight` that lies in `state` under `prefix`; its tensors are shared, not copied.

    Raises:
        ValueError: a tensor is missing or does not fit the others, or the weight is not NF4; names it.
    """
    name = prefix + "weight"
    entries = _read_entries(state, name)
    n = torch.Size(entries["shape"]).numel()
    return _read_tensors(state, name, entries, n, ((n + 1) // 2, 1), ())


def read_stack_fields(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The fields of the `NF4ExpertsWeight` that lies in `state` as `name`, as `read_fields`."""
    entries = _read_entries(state, name, of_experts=True)
    experts, rows, columns = entries["shape"]
    n = rows * columns
    return _read_tensors(state, name, entries, n, (experts, (n + 1) // 2), (experts,))


def read_scale(state: Mapping[str, Tensor], name: str, scale: str) -> Tensor:
    """The tensor that a module calls `scale` ("absmax", "offset", ...) of the weight that lies in `state` as `name`.

    Raises KeyError if it is not there.
    """
    if scale != "offset":
        return state[f"{name}.{scale}"]
    key = f"{name}.quant_state.bitsandbytes__nf4"
    return torch.tensor(parse_entries(state[key], key)["nested_offset"], dtype=torch.float32)


def _read_tensors(
    state: Mapping[str, Tensor],
    name: str,
    entries: dict[str, Any],
    n: int,
    codes_shape: tuple[int, ...],
    experts: tuple[int, ...],
) -> dict[str, Any]:
    """The fields of a weight, or of those of `experts` matrices, of n elements each."""
    blocksize = entries["blocksize"]
    check_blocksize(blocksize)
    blocks = -(-n // blocksize)
    # A checkpoint with another `quant_storage` holds the same bytes under another dtype.
    codes = _take(state, name).contiguous().view(torch.uint8).reshape(-1, 1)
    if codes.numel() == math.prod(codes_shape):
        codes = codes.reshape(codes_shape)
    _check(f"{name} (as bytes)", codes, torch.uint8, codes_shape)
    double = "nested_offset" in entries
    absmax = _take(state, f"{name}.absmax", torch.uint8 if double else torch.float32, (*experts, blocks))
    found = {
        "codes": codes,
        "absmax": absmax,
        "quant_map": _take(state, f"{name}.quant_map", torch.float32, (16,)),
        "blocksize": blocksize,
        "shape": torch.Size(entries["shape"]),
        "dtype": _DTYPES[entries["dtype"]],
    }
    if not double:
        return found
    nested_blocks = -(-blocks // entries["nested_blocksize"])
    return found | {
        "nested_absmax": _take(state, f"{name}.nested_absmax", torch.float32, (*experts, nested_blocks)),
        "nested_quant_map": _take(state, f"{name}.nested_quant_map", torch.float32, (256,)),
        "nested_blocksize": entries["nested_blocksize"],
        "offset": torch.tensor(entries["nested_offset"], dtype=torch.float32, device=absmax.device),
    }


def parse_entries(packed: Tensor, key: str) -> Any:
    """The JSON that `packed` holds as bytes; ValueError, which calls it `key`, if it holds none."""
    try:
        content = bytes(packed.tolist())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key} should hold JSON as uint8, and does not: {brief(str(error), 200)}") from None
    return parse_json(content, "it", lambda said: ValueError(f"{key} should hold JSON as uint8, and does not: {said}"))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_offset(value: object) -> bool:
    return type(value) in (int, float) and is_finite(value)


# The values that are accepted for each entry of the JSON.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "quant_type": lambda value: value == "nf4",
    "blocksize": _is_size,
    "dtype": lambda value: isinstance(value, str) and value in _DTYPES,
    "shape": lambda value: isinstance(value, list) and all(map(_is_size, value)),
}
_NESTED_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "nested_blocksize": lambda value: _is_size(value) and value > 0,
    "nested_dtype": lambda value: value == "float32",
    "nested_offset": _is_offset,
}
# Where they differ for the matrices of experts.
_ENTRIES_OF_EXPERTS: dict[str, Callable[[Any], bool]] = {
    "shape": lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_size, value)),
    "nested_offset": lambda value: isinstance(value, list) and all(map(_is_offset, value)),
}


def _read_entries(state: Mapping[str, Tensor], name: str, of_experts: bool = False) -> dict[str, Any]:
    """The JSON beside a packed weight, checked."""
    if f"{name}.quant_state.bitsandbytes__fp4" in state:
        raise ValueError(f"{name} is in FP4, which minipeft does not read: quantize the model to NF4 instead")
    key = f"{name}.quant_state.bitsandbytes__nf4"
    packed = _take(state, key)
    if packed.is_meta:
        raise ValueError(f"{key} has no data (device meta): it says how the weight is packed, and is needed")
    entries = parse_entries(packed, key)
    if not isinstance(entries, dict):
        raise ValueError(f"{key} should hold a JSON object, and holds {shown(entries)}")
    double = "nested_offset" in entries or f"{name}.nested_absmax" in state
    needed = _ENTRIES | _NESTED_ENTRIES if double else _ENTRIES
    if missing := sorted(needed.keys() - entries.keys()):
        raise ValueError(f"{key} lacks {', '.join(missing)}: it has {brief(', '.join(entries), 200)}")
    known = _ENTRIES | _NESTED_ENTRIES | (_ENTRIES_OF_EXPERTS if of_experts else {})
    for entry, value in entries.items():
        # An entry of a later version passes while it asks for nothing.
        supports = known.get(entry, lambda value: value is None)
        if not supports(value):
            raise ValueError(f"{key} has {entry} = {shown(value)}, which minipeft does not support")
    if of_experts and double and len(entries["nested_offset"]) != entries["shape"][0]:
        offsets = len(entries["nested_offset"])
        raise ValueError(f"{key} has {offsets} nested offsets for {entries['shape'][0]} experts")
    return entries


def _take(
    state: Mapping[str, Tensor], name: str, dtype: torch.dtype | None = None, shape: tuple[int, ...] = ()
) -> Tensor:
    if name not in state:
        raise ValueError(f"{name} is missing from the state of an NF4 weight")
    if dtype is not None:
        _check(name, state[name], dtype, shape)
    return state[name]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} should be {dtype_name(dtype)} {shape}, and is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        )

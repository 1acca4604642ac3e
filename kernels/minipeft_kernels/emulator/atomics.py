"""Atomics (PTX ISA 9.7.13): read, combine, write, a lane at a time where lanes share an address."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import rounding
from .lanes import ANY, DTYPES, elements, pick
from .memory_ops import CACHE, SPACES, VECTORS, Space
from .program import SIZES, Instruction
from .registry import Context, Execute, only, opcode, unsupported

Combine = Callable[..., np.ndarray]


def combination(instruction: Instruction, operation: str, kind: str) -> Combine:
    """The value that an atomic writes, as a function of the old value and its operands."""
    if kind in ("f16", "f16x2", "bf16", "bf16x2") and operation == "add":
        return lambda old, b: _add_halves(old, b, kind)
    increment: dict[str, Combine] = {
        "inc": lambda old, b: np.where(old >= b, 0, old + 1),
        "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - 1),
        "exch": lambda old, b: np.broadcast_to(b, old.shape),
        "cas": lambda old, b, c: pick(old == b, c, old),
    }
    plain: dict[str, Combine] = {
        **{"add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
        **{"min": np.minimum, "max": np.maximum},
    }
    found = increment.get(operation) or plain.get(operation)
    if found is None or (kind[0] == "f" and operation not in ("add", "exch")):
        raise unsupported(instruction, f"atomic {operation} of {kind}")
    return found


def _add_halves(old: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    dtype = np.float16 if kind[0] == "f" else np.uint16
    parts = [np.ascontiguousarray(x).view(dtype) for x in np.broadcast_arrays(old, b)]
    if kind[0] == "f":
        total = rounding.to_f16(parts[0].astype(np.float32) + parts[1].astype(np.float32))
    else:
        wide = [rounding.bf16_to_f32(p).astype(np.float64) for p in parts]
        total = rounding.f64_to_bf16(rounding.sum_to_odd(*wide))
    return total.view(old.dtype)


@opcode("atom", "red")
def build_atomic(instruction: Instruction, context: Context) -> Execute:
    """Atomics; lanes of one instruction take effect one after the other, by their number."""
    operations = ("add", "exch", "cas", "min", "max", "inc", "dec", "and", "or", "xor")
    mods = only(instruction, (*SPACES, *CACHE, *VECTORS, *operations, "noftz", "acq_rel", "async"))
    kind = instruction.types[0]
    (operation,) = mods & set(operations)
    operands = list(instruction.operands)
    if "L2::cache_hint" in mods:
        operands.pop()
    results = elements(operands.pop(0)) if instruction.opcode == "atom" else ()
    place, *values = operands
    combine = combination(instruction, operation, kind)
    columns = [[context.lanes.read(e, kind) for e in elements(v)] for v in values]
    writes = [context.lanes.write(r, kind) for r in results]
    address = context.lanes.address(place)
    space = Space(instruction, context)
    size = SIZES[kind]
    bits, dtype = DTYPES[f"b{8 * size}"], DTYPES[kind]
    count = len(columns[0])

    def execute(lanes: ANY) -> None:
        start = address(lanes)
        if space.watchers:
            space.watch(lanes, start, size * count, "atomic")
        for i in range(count):
            sources = [np.broadcast_to(column[i](lanes), start.shape) for column in columns]
            old = _in_turns(space, lanes, start + i * size, sources, combine, bits, dtype)
            if writes:
                writes[i](lanes, old)

    return execute


def _in_turns(
    space: Space,
    lanes: ANY,
    addresses: np.ndarray,
    sources: list[np.ndarray],
    combine: Combine,
    bits: np.dtype,
    dtype: np.dtype,
) -> np.ndarray:
    """Old values; where lanes share an address (and block), each sees what the one before it left."""
    who = space.context.lanes.indices(lanes)
    key = addresses if space.shared is None else addresses + (who // space.context.lanes.threads << 32)
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=key[order[0]] - 1))
    turn = np.arange(key.size) - np.repeat(first, np.diff(np.append(first, key.size)))
    turns = np.empty(key.size, np.int64)
    turns[order] = turn
    old = np.empty(key.size, dtype)
    watchers, space.watchers = space.watchers, []
    for step in range(int(turn.max()) + 1):
        now = slice(None) if step == 0 and turn.max() == 0 else np.flatnonzero(turns == step)
        before = space.load(who[now], addresses[now], bits.itemsize).view(dtype)
        old[now] = before
        after = np.ascontiguousarray(combine(before, *(s[now] for s in sources))).astype(dtype, copy=False)
        space.store(who[now], addresses[now], after.view(bits), watched=False)
    space.watchers = watchers
    return old

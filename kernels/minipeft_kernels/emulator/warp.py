"""Instructions by which the lanes of a warp exchange values (PTX ISA 9.7.9.6, 9.7.13): shfl, vote, match, redux, elect.

The machine calls them with every lane that their member mask names (exited ones apart), so a warp is there whole or
up to lanes that do not take part.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .lanes import ANY, WARP
from .program import Instruction, Operand, Pair
from .registry import Context, Execute, only, opcode, signed, unsupported

_U32 = np.uint32
_BITS = (np.ones(WARP, np.uint64) << np.arange(WARP, dtype=np.uint64)).astype(np.uint32)


def _results(instruction: Instruction) -> tuple[Operand, Operand | None]:
    first = instruction.operands[0]
    return (first.first, first.second) if isinstance(first, Pair) else (first, None)


@opcode("shfl")
def build_shuffle(instruction: Instruction, context: Context) -> Execute:
    """A value from another lane of the warp; the predicate says whether that lane was in range."""
    mods = only(instruction, ("sync", "up", "down", "bfly", "idx"))
    if "sync" not in mods:
        raise unsupported(instruction, "only shfl.sync is known")
    (mode,) = mods - {"sync"}
    lanes_of = context.lanes
    target, in_range = _results(instruction)
    write = lanes_of.write(target, "b32")
    write_range = lanes_of.write(in_range, "pred") if in_range is not None else None
    value, by, clamp = (lanes_of.read(o, "b32") for o in instruction.operands[1:4])
    lane = (lanes_of.everyone % WARP).astype(np.int64)
    warp = lanes_of.everyone - lane

    def execute(lanes: ANY) -> None:
        here, start = (lane, warp) if lanes is None else (lane[lanes], warp[lanes])
        source, valid = _source(mode, here, by(lanes).astype(np.int64), clamp(lanes).astype(np.int64))
        values = np.broadcast_to(value(None), lanes_of.count)[start + source]
        write(lanes, values)
        if write_range is not None:
            write_range(lanes, valid)

    return execute


def _source(mode: str, lane: np.ndarray, by: np.ndarray, clamp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lane read from, and whether it is in range; the lane itself where it is not."""
    by, segment = by & 31, clamp >> 8 & 31
    lowest = lane & segment
    last = lowest | clamp & 31 & ~segment
    if mode == "up":
        source = lane - by
        valid = source >= last
    else:
        source = {"down": lane + by, "bfly": lane ^ by, "idx": lowest | by & ~segment}[mode]
        valid = source <= last
    return np.where(valid, source, lane), valid


def _members(context: Context, lanes: ANY, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The lanes of its warp that take part, for each of `lanes`: (n, 32) bool, and its warp; None if all do in all."""
    count = context.lanes.count
    if lanes is None and (masks == 0xFFFFFFFF).all():
        return None
    active = np.zeros(count, bool)
    active[... if lanes is None else lanes] = True
    warp = context.lanes.indices(lanes) // WARP
    named = np.broadcast_to(masks, warp.shape)[:, None] & _BITS != 0
    return named & active.reshape(-1, WARP)[warp], warp


def _ballot(context: Context, lanes: ANY, masks: np.ndarray, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of `lanes`, the lanes that take part and those of them whose flag is set, as masks."""
    everywhere = np.zeros(context.lanes.count, bool)
    everywhere[... if lanes is None else lanes] = flags
    found = _members(context, lanes, masks)
    if found is None:
        bits = (everywhere.reshape(-1, WARP) * _BITS).sum(1, dtype=np.uint32)
        return np.full(context.lanes.count, 0xFFFFFFFF, np.uint32), np.repeat(bits, WARP)
    members, warp = found
    set_there = members & everywhere.reshape(-1, WARP)[warp]
    return (members * _BITS).sum(1, dtype=np.uint32), (set_there * _BITS).sum(1, dtype=np.uint32)


@opcode("vote")
def build_vote(instruction: Instruction, context: Context) -> Execute:
    """all, any, uni, ballot."""
    mods = only(instruction, ("sync", "all", "any", "uni", "ballot"))
    (mode,) = mods - {"sync"}
    flag, mask = context.lanes.read(instruction.operands[1], "pred"), context.lanes.read(instruction.operands[2], "b32")
    write = context.lanes.write(instruction.operands[0], "b32" if mode == "ballot" else "pred")
    results: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "all": lambda members, votes: votes == members,
        "any": lambda members, votes: votes != 0,
        "uni": lambda members, votes: (votes == members) | (votes == 0),
        "ballot": lambda members, votes: votes,
    }

    def execute(lanes: ANY) -> None:
        write(lanes, results[mode](*_ballot(context, lanes, mask(lanes), flag(lanes))))

    return execute


@opcode("activemask")
def build_active(instruction: Instruction, context: Context) -> Execute:
    """The lanes that execute this together."""
    write = context.lanes.write(instruction.operands[0], "b32")
    everyone = np.full(1, 0xFFFFFFFF, np.uint32)

    def execute(lanes: ANY) -> None:
        write(lanes, _ballot(context, lanes, everyone, np.ones(1, bool))[1])

    return execute


@opcode("elect")
def build_elect(instruction: Instruction, context: Context) -> Execute:
    """The lowest lane of the mask gets the predicate."""
    only(instruction, ("sync",))
    target, predicate = _results(instruction)
    if predicate is None:
        raise unsupported(instruction, "it has no predicate")
    write, elected = context.lanes.write(target, "b32"), context.lanes.write(predicate, "pred")
    mask = context.lanes.read(instruction.operands[1], "b32")

    def execute(lanes: ANY) -> None:
        members, _ = _ballot(context, lanes, mask(lanes), np.ones(1, bool))
        lowest = np.log2((members & (~members + _U32(1))).astype(np.float64)).astype(np.uint32)
        write(lanes, lowest)
        elected(lanes, lowest == context.lanes.indices(lanes) % WARP)

    return execute


_REDUCE: dict[str, tuple[np.ufunc, int]] = {
    **{"add": (np.add, 0), "and": (np.bitwise_and, -1), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0)},
    **{"min": (np.minimum, 1), "max": (np.maximum, -1)},
}


@opcode("redux")
def build_redux(instruction: Instruction, context: Context) -> Execute:
    """One value from all members."""
    mods = only(instruction, ("sync", *_REDUCE))
    (name,) = mods - {"sync"}
    kind = instruction.types[0]
    if kind == "f32":
        raise unsupported(instruction, "redux of floats")
    reduce, neutral = _REDUCE[name]
    value, mask = context.lanes.read(instruction.operands[1], kind), context.lanes.read(instruction.operands[2], "b32")
    write = context.lanes.write(instruction.operands[0], kind)
    wide = np.iinfo(np.int32 if signed(kind) else np.uint32)
    if name in ("min", "max"):
        neutral = wide.max if name == "min" else wide.min

    def execute(lanes: ANY) -> None:
        everywhere = np.zeros(context.lanes.count, np.int64)
        everywhere[... if lanes is None else lanes] = value(lanes)
        rows = everywhere.reshape(-1, WARP)
        found = _members(context, lanes, mask(lanes))
        if found is None:
            write(lanes, np.repeat(reduce.reduce(rows, axis=1), WARP))
        else:
            members, warp = found
            write(lanes, reduce.reduce(np.where(members, rows[warp], neutral), axis=1))

    return execute


@opcode("match")
def build_match(instruction: Instruction, context: Context) -> Execute:
    """The members that have the same value; all: only if all have."""
    mods = only(instruction, ("sync", "any", "all"))
    kind = instruction.types[0]
    target, predicate = _results(instruction)
    write = context.lanes.write(target, "b32")
    agree = context.lanes.write(predicate, "pred") if predicate is not None else None
    value, mask = context.lanes.read(instruction.operands[1], kind), context.lanes.read(instruction.operands[2], "b32")

    def execute(lanes: ANY) -> None:
        everywhere = np.broadcast_to(value(None), context.lanes.count)
        masks = mask(lanes)
        found = _members(context, lanes, masks)
        who = context.lanes.indices(lanes)
        members = np.ones((who.size, WARP), bool) if found is None else found[0]
        same = members & (everywhere.reshape(-1, WARP)[who // WARP] == everywhere[who][:, None])
        bits = (same * _BITS).sum(1, dtype=np.uint32)
        if "all" in mods:
            whole = bits == (members * _BITS).sum(1, dtype=np.uint32)
            bits = np.where(whole, bits, _U32(0))
            if agree is not None:
                agree(lanes, whole)
        write(lanes, bits)

    return execute

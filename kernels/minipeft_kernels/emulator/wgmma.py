"""wgmma: Hopper's products of four warps, operands read from shared memory by descriptor (PTX ISA 9.7.15).

They are executed when issued; `commit_group` and `wait_group` then have nothing left to do. A program that writes the
operands, or reads the sums, before it waits is wrong on a GPU and may be right here.

A descriptor: bits 0-13 start address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 62-63 the swizzle:
none, 128, 64 or 32 bytes. Swizzling exchanges 16-byte units of a row by an exclusive-or with the row's number: address
bits 4 and up with bits 7 and up. With depth contiguous ("K-major"), 8 rows of one swizzle width are a unit, and units
follow each other along the rows by the stride offset. Otherwise the unit is 8 steps of depth by one swizzle width of
rows; units follow along the rows by the leading offset, along the depth by the stride offset.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .lanes import ANY, WARP, elements
from .memory import Fault
from .memory_ops import Space
from .program import Instruction, Vector
from .registry import Context, Execute, opcode, refused, unsupported
from .tensor_cores import PER_REGISTER, Sums, decoded, left_matrix, stacked, sums_fragments, sums_matrix

GROUP = 128
_SWIZZLE_BYTES = {0: 0, 1: 128, 2: 64, 3: 32}


def element_addresses(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
    """(rows, depth) addresses in shared memory of an operand's elements of `size` bytes."""
    start, leading, stride = (16 * (descriptor >> shift & 0x3FFF) for shift in (0, 16, 32))
    width = _SWIZZLE_BYTES[descriptor >> 62 & 3]
    row, at = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if not transposed:
        across = at * size
        if not width:
            return start + row // 8 * stride + row % 8 * 16 + across // 16 * leading + across % 16
        logical = start + row // 8 * stride + row % 8 * width + across
    else:
        across = row * size
        if not width:
            return start + at // 8 * leading + at % 8 * 16 + across // 16 * stride + across % 16
        logical = start + across // width * leading + at // 8 * stride + at % 8 * width + across % width
    return logical ^ (logical >> 7 & (width // 16 - 1)) << 4


def _operand(
    instruction: Instruction, context: Context, space: Space, rows: int, depth: int, kind: str, transposed: bool
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of each group's descriptor and first lane that reads its operand, (groups, rows, depth) float64."""
    size = 4 // PER_REGISTER[kind]
    cache: dict[int, np.ndarray] = {}
    shared = space.shared
    assert shared is not None

    def read(descriptors: np.ndarray, first: np.ndarray) -> np.ndarray:
        places = []
        for value in descriptors.tolist():
            if value not in cache:
                cache[value] = element_addresses(value, rows, depth, size, transposed)
            places.append(cache[value].ravel())
        addresses = np.concatenate(places)
        lanes = np.repeat(first, rows * depth)
        for watcher in context.shared_watchers:
            watcher.shared_access(instruction, "matrix", lanes, addresses, size)
        try:
            values = shared.load(lanes, addresses, size)
        except Fault as fault:
            raise refused(context, instruction, lanes, fault) from None
        return decoded_elements(values, kind).reshape(-1, rows, depth)

    return read


def decoded_elements(values: np.ndarray, kind: str) -> np.ndarray:
    """Elements, one a word of their size, to float64."""
    packed = np.zeros(-(-values.nbytes // 4) * 4 // values.dtype.itemsize, values.dtype)
    packed[: values.size] = values
    return decoded(packed.view(np.uint32), kind)[: values.size]


@opcode("wgmma")
def build_wgmma(instruction: Instruction, context: Context) -> Execute:
    """mma_async; fence, commit_group and wait_group."""
    if "mma_async" not in instruction.modifiers:
        return lambda lanes: None
    shape = next(m for m in instruction.modifiers if m[0] == "m" and m[1:2].isdigit())
    columns, depth = (int(n) for n in shape[1:].replace("n", " ").replace("k", " ").split()[1:])
    result, a_kind, b_kind = instruction.types
    d, a, b, scale, *constants = instruction.operands
    signs = [context.lanes.constant(c) for c in constants]
    in_registers = isinstance(a, Vector)
    flags = signs[2:] if a_kind in ("f16", "bf16") else []
    if result not in ("f32", "f16", "s32") or depth * (4 // PER_REGISTER[a_kind]) != 32 or None in signs:
        raise unsupported(instruction, "its shape or types")
    transpose_a = bool(flags[0]) if flags and not in_registers else False
    transpose_b = bool(flags[-1]) if flags else False
    factor = float((signs[0] or 0) * (signs[1] or 0)) if len(signs) >= 2 else 1.0
    lanes_of = context.lanes
    registers = elements(d)
    sums = Sums(
        result, [lanes_of.read(r, "b32") for r in registers], [lanes_of.write(r, "b32") for r in registers], False
    )
    space = Space(_shared(instruction), context)
    read_b = _operand(instruction, context, space, columns, depth, b_kind, transpose_b)
    read_a = None if in_registers else _operand(instruction, context, space, 64, depth, a_kind, transpose_a)
    a_words = [lanes_of.read(r, "b32") for r in elements(a)] if in_registers else []
    a_descriptor = None if in_registers else lanes_of.read(a, "b64")
    b_descriptor, keep = lanes_of.read(b, "b64"), lanes_of.read(scale, "pred")

    def execute(lanes: ANY) -> None:
        who = lanes_of.indices(lanes)
        first = who[::GROUP]
        if a_descriptor is None:
            left = left_matrix(stacked(a_words, lanes, who.size), a_kind).reshape(first.size, 64, depth)
        else:
            assert read_a is not None
            left = read_a(np.broadcast_to(a_descriptor(lanes), who.shape)[::GROUP], first)
        right = read_b(np.broadcast_to(b_descriptor(lanes), who.shape)[::GROUP], first)
        product = factor * (left @ right.transpose(0, 2, 1))  # (groups, 64, columns)
        tiles = product.reshape(-1, 4, 16, columns // 8, 8).transpose(0, 1, 3, 2, 4)  # group, warp, tile, row, column
        before = sums.read(lanes, who.size).reshape(-1, WARP, columns // 8, 4).transpose(0, 2, 1, 3)
        kept = np.broadcast_to(keep(lanes), who.shape)[::GROUP]
        old = sums_matrix(before.reshape(-1, 4)).reshape(tiles.shape)
        total = np.where(kept[:, None, None, None, None], old + tiles, tiles)
        after = sums_fragments(total.reshape(-1, 16, 8)).reshape(-1, columns // 8, WARP, 4)
        sums.write(lanes, np.ascontiguousarray(after.transpose(0, 2, 1, 3)).reshape(who.size, -1))

    return execute


def _shared(instruction: Instruction) -> Instruction:
    """The instruction as an access to shared memory."""
    from dataclasses import replace

    return replace(instruction, modifiers=(*instruction.modifiers, "shared"))

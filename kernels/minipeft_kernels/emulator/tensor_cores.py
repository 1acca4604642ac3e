"""mma.sync, ldmatrix and stmatrix (PTX ISA 9.7.14).

The order and the rounding of a tensor core's internal sums are NVIDIA's secret. Here a product's terms are exact, they
and the accumulator are summed in float64, and the sum is rounded once to the accumulator's type: closer to the exact
result than the hardware, whose error the kernels' tolerances have to allow.
"""

from __future__ import annotations

import numpy as np

from . import float8, rounding
from .lanes import ANY, WARP, Read, Write, elements
from .memory_ops import Space
from .program import Instruction
from .registry import Context, Execute, only, opcode, unsupported

# Elements of a type in a 32-bit register.
PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "e4m3": 4, "e5m2": 4}


def decoded(words: np.ndarray, kind: str) -> np.ndarray:
    """(..., r) 32-bit registers to (..., r * elements) float64."""
    words = np.ascontiguousarray(words)
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return rounding.bf16_to_f32(words.view(np.uint16)).astype(np.float64)
    if kind == "tf32":
        # The hardware does not look at the low bits.
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in ("e4m3", "e5m2"):
        return float8.values(kind)[words.view(np.uint8)].astype(np.float64)
    return words.view({"s8": np.int8, "u8": np.uint8}[kind]).astype(np.float64)


def stacked(reads: list[Read], lanes: ANY, count: int) -> np.ndarray:
    """(count, registers) words."""
    words = np.empty((count, len(reads)), np.uint32)
    for i, read in enumerate(reads):
        words[:, i] = read(lanes)
    return words


def left_matrix(words: np.ndarray, kind: str) -> np.ndarray:
    """(32 W, registers) fragments of A to (W, 16, K).

    A lane is (g, t), g = lane / 4. Register r has row g + 8 (r mod 2), columns t E + e + 4 E (r / 2).
    """
    e = PER_REGISTER[kind]
    parts = decoded(words, kind).reshape(-1, 8, 4, words.shape[1] // 2, 2, e)  # W, g, t, r / 2, r mod 2, e
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(parts.shape[0], 16, -1)


def right_matrix(words: np.ndarray, kind: str) -> np.ndarray:
    """(32 W, registers) fragments of B to (W, K, 8): register r has rows t E + e + 4 E r, column g."""
    parts = decoded(words, kind).reshape(-1, 8, 4, words.shape[1], PER_REGISTER[kind])  # W, g, t, r, e
    return parts.transpose(0, 3, 2, 4, 1).reshape(parts.shape[0], -1, 8)


def sums_matrix(values: np.ndarray) -> np.ndarray:
    """(32 W, 4) to (W, 16, 8): value v is in row g + 8 (v / 2), column 2 t + v mod 2."""
    return values.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)


def sums_fragments(matrix: np.ndarray) -> np.ndarray:
    """(W, 16, 8) to (32 W, 4), the inverse."""
    return matrix.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)


class Sums:
    """Accumulators in registers, as (n, values) float64 and back, by their type."""

    def __init__(self, kind: str, reads: list[Read], writes: list[Write], satfinite: bool) -> None:
        self.kind, self.reads, self.writes, self.satfinite = kind, reads, writes, satfinite

    def read(self, lanes: ANY, count: int) -> np.ndarray:
        """(count, values) float64."""
        words = stacked(self.reads, lanes, count)
        return words.view({"f32": np.float32, "s32": np.int32, "f16": np.float16}[self.kind]).astype(np.float64)

    def write(self, lanes: ANY, values: np.ndarray) -> None:
        """Rounded once to the type; integers wrap, or clamp."""
        if self.kind == "f32":
            words = rounding.canonical(values.astype(np.float32)).view(np.uint32)
        elif self.kind == "f16":
            words = np.ascontiguousarray(rounding.to_f16(values)).view(np.uint32)
        else:
            if self.satfinite:
                values = np.clip(values, -(2**31), 2**31 - 1)
            words = values.astype(np.int64).astype(np.uint32)
        for i, write in enumerate(self.writes):
            write(lanes, words[:, i])


@opcode("mma")
def build_mma(instruction: Instruction, context: Context) -> Execute:
    """mma.sync.aligned of 16 rows and 8 columns."""
    mods = only(instruction, (*_SHAPES, "sync", "aligned", "row", "col", "satfinite", "kind::f8f6f4"))
    result, a_kind, b_kind, c_kind = instruction.types
    shapes = mods & set(_SHAPES)
    depth = _SHAPES.get(next(iter(shapes), ""))
    if depth is None or "col" not in mods or a_kind not in PER_REGISTER or b_kind not in PER_REGISTER:
        raise unsupported(instruction, "its shape or types")
    d, a, b, c = (elements(o) for o in instruction.operands)
    e = PER_REGISTER[a_kind]
    if len(a) != 16 * depth // (WARP * e) or len(b) != 8 * depth // (WARP * e) or result != c_kind:
        raise unsupported(instruction, "its number of registers")
    lanes_of = context.lanes
    read_a, read_b, read_c = ([lanes_of.read(r, "b32") for r in regs] for regs in (a, b, c))
    sums = Sums(c_kind, read_c, [lanes_of.write(r, "b32") for r in d], "satfinite" in mods)

    def execute(lanes: ANY) -> None:
        count = lanes_of.count if lanes is None else lanes.size
        left = left_matrix(stacked(read_a, lanes, count), a_kind)
        right = right_matrix(stacked(read_b, lanes, count), b_kind)
        total = sums_matrix(sums.read(lanes, count)) + left @ right
        sums.write(lanes, sums_fragments(total))

    return execute


_SHAPES = {"m16n8k4": 4, "m16n8k8": 8, "m16n8k16": 16, "m16n8k32": 32}
_MATRICES = {"x1": 1, "x2": 2, "x4": 4}


def _matrix_mods(instruction: Instruction) -> tuple[int, bool]:
    mods = only(instruction, ("sync", "aligned", "m8n8", "trans", "shared", "shared::cta", *_MATRICES))
    if instruction.types != ("b16",) or "m8n8" not in mods:
        raise unsupported(instruction, "only matrices of 8x8 16-bit values are known")
    return next((_MATRICES[m] for m in mods if m in _MATRICES), 1), "trans" in mods


def _of_rows(values: np.ndarray, matrices: int) -> np.ndarray:
    """(W, 8 matrices) of whole warps' lanes, or of what they hold, those that give the rows' addresses."""
    return values.reshape(-1, WARP)[:, : 8 * matrices]


@opcode("ldmatrix")
def build_ldmatrix(instruction: Instruction, context: Context) -> Execute:
    """8x8 matrices from shared memory: lane 8 i + j has the address of row j of matrix i, 16 bytes."""
    matrices, transposed = _matrix_mods(instruction)
    writes = [context.lanes.write(r, "b32") for r in elements(instruction.operands[0])]
    address = context.lanes.address(instruction.operands[1])
    space = Space(instruction, context)

    def execute(lanes: ANY) -> None:
        rows = _of_rows(context.lanes.indices(lanes), matrices)
        starts = _of_rows(address(lanes), matrices)
        words = space.load(rows.ravel(), np.ascontiguousarray(starts).ravel(), 16)
        halves = words.view(np.uint16).reshape(-1, matrices, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.transpose(0, 1, 3, 2))
        fragments = halves.view(np.uint32).reshape(-1, matrices, WARP)
        for i, write in enumerate(writes):
            write(lanes, fragments[:, i].ravel())

    return execute


@opcode("stmatrix")
def build_stmatrix(instruction: Instruction, context: Context) -> Execute:
    """The inverse of ldmatrix."""
    matrices, transposed = _matrix_mods(instruction)
    reads = [context.lanes.read(r, "b32") for r in elements(instruction.operands[1])]
    address = context.lanes.address(instruction.operands[0])
    space = Space(instruction, context)

    def execute(lanes: ANY) -> None:
        who = context.lanes.indices(lanes)
        words = stacked(reads, lanes, who.size).reshape(-1, WARP, matrices)
        halves = np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint16).reshape(-1, matrices, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.transpose(0, 1, 3, 2))
        starts = _of_rows(address(lanes), matrices)
        values = halves.reshape(-1, 8).view(np.complex128)[:, 0]
        space.store(_of_rows(who, matrices).ravel(), np.ascontiguousarray(starts).ravel(), values)

    return execute

"""The part of a GPU that an instruction of PTX keeps busy: the classes that counts are given in.

PTX is not machine code. The assembler lets moves and changes of an address's width vanish, fuses additions with
shifts, and spells a division out. So counts by class say what the program asks for; `minipeft kernels` counts what the
assembler makes of it.
"""

from __future__ import annotations

import re

from .program import Instruction

CLASSES = (
    "tensor",
    "integer",
    "multiply-add",
    "convert",
    "special",
    "shared",
    "global",
    "local",
    "lane",
    "barrier",
    "control",
    "move",
)
"""tensor: matrix products. integer: the integer and logic pipe, comparisons and selections too. multiply-add: floating
point, and integer products. special: roots, exponentials and quotients. lane: shuffles and votes. move: what the
assembler renames away, and parameters."""

_BY_OPCODE = {
    **dict.fromkeys(("mma", "wgmma", "tcgen05"), "tensor"),
    **dict.fromkeys(("ldmatrix", "stmatrix"), "shared"),
    **dict.fromkeys(("shfl", "vote", "redux", "match", "activemask", "elect"), "lane"),
    **dict.fromkeys(("bar", "barrier", "membar", "fence", "mbarrier", "griddepcontrol"), "barrier"),
    **dict.fromkeys(("bra", "ret", "exit", "call", "trap", "brx"), "control"),
    **dict.fromkeys(("mov", "cvta", "mapa"), "move"),
    **dict.fromkeys(("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", "div", "rem"), "special"),
    **dict.fromkeys(("fma", "mad", "mul", "mul24", "mad24", "dp4a"), "multiply-add"),
}
_FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64", "tf32")
_INTEGERS = re.compile(r"[bsu](8|16|32|64)$")
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")
# Warps that execute one wgmma together.
WARPGROUP = 4


def class_of(instruction: Instruction) -> str:
    """One of CLASSES."""
    opcode, types = instruction.opcode, instruction.types
    if opcode == "wgmma":
        return "tensor" if "mma_async" in instruction.modifiers else "barrier"
    if opcode == "cp":
        return "global" if "global" in instruction.mnemonic and "shared" in instruction.mnemonic else "barrier"
    if opcode in ("ld", "st", "atom", "red"):
        space = instruction.space
        return "move" if space in ("param", "const") else "global" if space == "generic" else space
    if opcode == "cvt":
        # Widening, narrowing and reinterpreting integers: a register is read as another one.
        return "move" if all(_INTEGERS.match(t) for t in types) and "sat" not in instruction.modifiers else "convert"
    if opcode in ("add", "sub", "neg", "abs"):
        return "multiply-add" if types and types[-1] in _FLOATS else "integer"
    return _BY_OPCODE.get(opcode, "integer")


def tensor_flops(instruction: Instruction) -> float:
    """Operations (a product and a sum are two) of one warp's share of a matrix product; 0 for other instructions."""
    if class_of(instruction) != "tensor":
        return 0.0
    shape = next((_SHAPE.match(m) for m in instruction.modifiers if _SHAPE.match(m)), None)
    assert shape is not None, instruction.text
    m, n, k = (int(g) for g in shape.groups())
    return 2.0 * m * n * k / (WARPGROUP if instruction.opcode == "wgmma" else 1)

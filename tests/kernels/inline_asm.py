"""The few PTX instructions of the kernels' inline assembly, in numpy, so that the interpreter can run them too."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Lane 4 of a warp: the lanes before it, and itself with those after.
SPECIAL = {"%lanemask_lt": 0x0000000F, "%lanemask_ge": 0xFFFFFFF0}


def prmt(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """PTX ISA, prmt: each selector nibble picks a byte of (b, a), or with its top bit that byte's sign, eight times."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = c >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)) * 8).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        result |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return result


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """PTX ISA, lop3: any function of three bits, its value for (a, b, c) being bit 4a + 2b + c of the table."""
    result = np.zeros_like(a)
    for i in range(8):
        if int(table.flat[0]) >> i & 1:
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result |= term
    return result


def _halves(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """uint32 -> (..., 2) of a 16-bit dtype, low half first."""
    return torch.from_numpy(np.ascontiguousarray(x).view(np.int16).reshape(*x.shape, 2)).view(dtype)


def _word(low: torch.Tensor, high: torch.Tensor) -> np.ndarray:
    return torch.stack([low, high], -1).contiguous().view(torch.int16).numpy().view(np.uint32).reshape(low.shape)


def _convert(dtype: torch.dtype) -> Callable[..., np.ndarray]:
    def convert(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        parts = [torch.from_numpy(np.ascontiguousarray(p).view(np.float32)).to(dtype) for p in (low, high)]
        return _word(*parts)

    return convert


def _multiply(dtype: torch.dtype) -> Callable[..., np.ndarray]:
    def multiply(a: np.ndarray, b: np.ndarray, *minus_zero: np.ndarray) -> np.ndarray:
        assert all((z == 0x80008000).all() for z in minus_zero)
        # A product of two 16-bit numbers is exact in float32, so rounded once.
        product = (_halves(a, dtype).float() * _halves(b, dtype).float()).to(dtype)
        return _word(product[..., 0], product[..., 1])

    return multiply


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "mul.hi.u32": lambda a, b: (a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)).astype(np.uint32),
    "cvt.rn.bf16x2.f32": _convert(torch.bfloat16),
    "cvt.rn.f16x2.f32": _convert(torch.float16),
    "fma.rn.bf16x2": _multiply(torch.bfloat16),
    "mul.rn.f16x2": _multiply(torch.float16),
}


def run(assembly: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Execute inline assembly on uint32 arrays of one shape; operands are outputs, then inputs."""
    shape = inputs[0].shape
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    registers |= {name: np.full(shape, value, np.uint32) for name, value in SPECIAL.items()}
    for statement in assembly.strip(" {}").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        operation, rest = statement.strip().split(" ", 1)
        target, *names = re.split(r",\s*", rest.strip())
        values = [registers[n] if n in registers else np.full(shape, int(n, 0), np.uint32) for n in names]
        registers[target] = OPERATIONS[operation](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def create_inline_asm(
    self: Any, assembly: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
) -> Any:
    """For Triton's interpreter, which lacks it: elements of less than 32 bits share a register, `pack` at a time."""
    from triton.runtime.interpreter import TensorHandle

    shape = values[0].data.shape
    inputs: list[np.ndarray] = []
    for value in values:
        # (groups, pack elements) -> (groups, registers)
        groups = np.ascontiguousarray(value.data).reshape(-1, pack).view(np.uint32)
        inputs += [np.ascontiguousarray(groups[:, i]) for i in range(groups.shape[1])]
    outputs = constraints.count("=")
    results = run(assembly, outputs, inputs)
    each = outputs // len(types)
    stacked = [np.stack(results[i * each : (i + 1) * each], axis=1).view(np.int32) for i in range(len(types))]
    handles = [
        TensorHandle(s.reshape(shape), t.scalar if hasattr(t, "scalar") else t)
        for s, t in zip(stacked, types, strict=True)
    ]

    class Call:
        def get_result(self, i: int) -> Any:
            return handles[i]

    return Call()

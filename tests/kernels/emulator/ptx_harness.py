"""Small PTX kernels for the emulator's tests: one lane an element, inputs and outputs by name."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from processes import run_process

from minipeft_kernels.emulator import Memory, Observer, parse, run
from minipeft_kernels.lab.sass import tool

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
# The register that holds a value of so many bytes, and what it is loaded and stored as.
REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body: str, pointers: list[str], threads: int = 64, shared: str = "", target: str = "sm_90a") -> str:
    """PTX of a kernel whose pointers are in registers of their names; %tid in `tid`, the lane of the grid in `lane`."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 param_{p}" for p in pointers)
    loads = "\n".join(f".reg .b64 {p}; ld.param.b64 {p}, [param_{p}];" for p in pointers)
    return f"""
.version 8.7
.target {target}
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
{shared}
.reg .pred %p<20>;
.reg .b16 %h<40>;
.reg .b32 %r<80>;
.reg .b64 %d<40>;
.reg .b32 tid, lane, block;
{loads}
mov.u32 tid, %tid.x;
mov.u32 block, %ctaid.x;
mad.lo.s32 lane, block, {threads}, tid;
{body}
ret;
}}
"""


def launch(
    text: str,
    tensors: Mapping[str, np.ndarray],
    blocks: int = 1,
    threads: int = 64,
    shared_bytes: int = 0,
    observers: tuple[Observer, ...] = (),
    uninitialized: tuple[str, ...] = (),
    **options: int,
) -> None:
    """Run a kernel of `kernel` on arrays, in place; they lie 4 KB apart."""
    memory, address, arguments = Memory(), 0x10000, []
    for name, array in tensors.items():
        memory.bind(name, array.view(np.uint8).reshape(-1), address, initialized=name not in uninitialized)
        arguments.append(address)
        address += -(-array.nbytes // 4096) * 4096 + 4096
    run(parse(text), arguments, memory, (blocks, 1, 1), threads, shared_bytes, observers, **options)


def evaluate(body: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Run straight-line code on a lane for each element.

    Args:
        body: reads registers named as the inputs and writes ones named as the outputs.
        inputs: arrays of one length. outputs: dtype of each, such as "u4".
    """
    count = len(next(iter(inputs.values())))
    padded = -(-count // 32) * 32
    arrays = {f"in_{n}": np.resize(a, padded) for n, a in inputs.items()}
    arrays |= {f"out_{n}": np.zeros(padded, dtype) for n, dtype in outputs.items()}
    lines = []
    for name, array in arrays.items():
        register = name.partition("_")[2]
        lines.append(
            f".reg .{REGISTER[array.itemsize]} {register}; mad.wide.u32 {name}, lane, {array.itemsize}, {name};"
        )
        if name.startswith("in_"):
            lines.append(f"ld.global.b{8 * array.itemsize} {register}, [{name}];")
    stores = [f"st.global.b{8 * arrays[f'out_{n}'].itemsize} [out_{n}], {n};" for n in outputs]
    text = kernel("\n".join([*lines, body, *stores]), list(arrays), threads=padded)
    launch(text, arrays, threads=padded)
    return {n: arrays[f"out_{n}"][:count] for n in outputs}


@cache
def assembles(text: str, target: str = "sm_90a") -> bool:
    """True if NVIDIA's assembler, which Triton ships, takes a program; raises AssertionError with its message else."""
    command = [tool("ptxas"), f"-arch={target}", "-", "-o", "/dev/null"]
    done = run_process(command, text=text)
    if done.returncode:
        raise AssertionError(f"{Path(command[0]).name}: {done.stderr[:2000]}")
    return True

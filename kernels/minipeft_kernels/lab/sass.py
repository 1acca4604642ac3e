"""Reading NVIDIA machine code (SASS): instructions, the inner loop, and what each instruction keeps busy.

A GPU's four schedulers issue one instruction a clock each, and that is the first limit of a kernel which decodes four
bits a weight. The second is the pipe that executes them: integer and logical instructions, byte permutes too, go to a
pipe that takes half a warp a clock, so two clocks an instruction; multiply-adds, also of integers, go to another.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
_TARGET = re.compile(r"0x([0-9a-f]+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")

MMA = ("HMMA", "HGMMA", "UTCHMMA")
_CLASSES = {
    "tensor": MMA,
    "integer": (
        *("PRMT", "LOP3", "SHF", "IADD3", "IADD", "VIADD", "LEA", "ISETP", "SEL", "MOV", "P2R", "R2P", "PLOP3", "SGXT"),
        *("BMSK", "IMNMX", "VIMNMX", "FMNMX", "FSETP", "FSEL", "IABS", "LOP", "VIADDMNMX", "VIMNMX3"),
    ),
    "multiply-add": ("IMAD", "FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "FADD2", "FMUL2", "FFMA2"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "ATOMS"),
    "global": ("LDG", "STG", "LDGSTS", "RED", "ATOMG", "ATOM", "UTMALDG", "LD", "ST"),
    "convert": ("F2FP", "F2F", "I2F", "I2FP", "F2I", "MUFU", "POPC", "FLO"),
    "lane": ("SHFL", "VOTE", "REDUX", "MATCH"),
    "local": ("LDL", "STL"),
}
CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names}


@dataclass(frozen=True)
class Instruction:
    """One instruction at `address`; `name` without its modifiers, `full` with them."""

    address: int
    predicate: str
    full: str
    operands: str

    @property
    def name(self) -> str:
        """`full` without its modifiers."""
        return self.full.split(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch goes to, or None."""
        found = _TARGET.findall(self.operands) if self.name == "BRA" else []
        return int(found[-1], 16) if found else None


@dataclass(frozen=True)
class Loop:
    """The instructions that one turn of a loop executes, along its heaviest path."""

    instructions: tuple[Instruction, ...]

    def names(self) -> Counter[str]:
        """The number of times that each instruction occurs."""
        return Counter(i.name for i in self.instructions)

    def classes(self) -> Counter[str]:
        """The same by class; uniform, branch and synchronization instructions are "other"."""
        return Counter(CLASS_OF.get(i.name, "other") for i in self.instructions)


@dataclass(frozen=True)
class Function:
    """The machine code of one kernel."""

    name: str
    instructions: tuple[Instruction, ...]

    def inner_loop(self, work: tuple[str, ...] = MMA) -> Loop | None:
        """The innermost loop that does most of the `work` (names of instructions), or None if none does any."""
        blocks, successors = _flow(self.instructions)
        nodes = set(blocks)
        found: list[Instruction] | None = None
        while True:
            candidates = [(_work(blocks, c, work), c) for c in _components(nodes, successors)]
            best, component = max(candidates, key=lambda c: c[0], default=(0, set()))
            if not best:
                break
            header = min(component)
            inside = {n: [s for s in successors[n] if s in component and s != header] for n in component}
            found = _heaviest_path(blocks, inside, header, work)
            nodes, successors = component, inside
        return Loop(tuple(found)) if found else None


def _work(blocks: dict[int, list[Instruction]], nodes: set[int], work: tuple[str, ...]) -> int:
    return sum(i.name in work for n in nodes for i in blocks[n])


def _flow(code: tuple[Instruction, ...]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """Basic blocks by first address, and which follows which. BRA.DIV goes to a copy for diverged warps: left out."""
    starts = {code[0].address} if code else set()
    after = {a.address: b.address for a, b in itertools.pairwise(code)}
    for i in code:
        if i.name in ("BRA", "EXIT", "RET"):
            starts |= {s for s in (i.target, after.get(i.address)) if s is not None}
    blocks: dict[int, list[Instruction]] = {}
    for i in code:
        if i.address in starts:
            blocks[i.address] = current = []
        current.append(i)
    successors: dict[int, list[int]] = {}
    for start, block in blocks.items():
        last = block[-1]
        following = after.get(last.address)
        ends = last.name in ("BRA", "EXIT", "RET") and not last.predicate and last.full not in ("BRA.DIV", "BRA.CONV")
        out = [] if ends or following is None else [following]
        if last.target in blocks and last.full != "BRA.DIV":
            out.append(last.target)
        successors[start] = out
    return blocks, successors


def _components(nodes: set[int], successors: dict[int, list[int]]) -> list[set[int]]:
    """The strongly connected components that hold a cycle (Kosaraju): each is a loop with the loops inside it."""
    order: list[int] = []
    seen: set[int] = set()
    for root in nodes:
        stack = [(root, iter(successors[root]))] if root not in seen else []
        seen.add(root)
        while stack:
            node, rest = stack[-1]
            child = next((s for s in rest if s in nodes and s not in seen), None)
            if child is None:
                order.append(stack.pop()[0])
            else:
                seen.add(child)
                stack.append((child, iter(successors[child])))
    backward: dict[int, list[int]] = {n: [] for n in nodes}
    for n in nodes:
        for s in successors[n]:
            if s in nodes:
                backward[s].append(n)
    components = []
    left = set(nodes)
    for root in reversed(order):
        if root not in left:
            continue
        component, queue = set(), [root]
        left.discard(root)
        while queue:
            node = queue.pop()
            component.add(node)
            fresh = [p for p in backward[node] if p in left]
            left.difference_update(fresh)
            queue += fresh
        if len(component) > 1 or root in successors[root]:
            components.append(component)
    return components


def _heaviest_path(
    blocks: dict[int, list[Instruction]], successors: dict[int, list[int]], header: int, work: tuple[str, ...]
) -> list[Instruction]:
    """From the header on, the path with most work, then most instructions; a loop inside is walked once."""
    best: dict[int, tuple[tuple[int, int], list[int]]] = {}
    active: set[int] = set()

    def walk(node: int) -> tuple[tuple[int, int], list[int]]:
        if node in best:
            return best[node]
        active.add(node)
        tails = [walk(s) for s in successors[node] if s not in active]
        (done, length), tail = max(tails, key=lambda t: t[0], default=((0, 0), []))
        active.discard(node)
        best[node] = ((done + _work(blocks, {node}, work), length + len(blocks[node])), [node, *tail])
        return best[node]

    return [i for node in walk(header)[1] for i in blocks[node]]


def tool(name: str) -> str:
    """Path of a CUDA binary tool that Triton ships."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"Triton's {name} is not at {path}: reading machine code needs it")
    return str(path)


def disassemble(cubin: Path) -> list[Function]:
    """Every function in a cubin file."""
    text = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = []
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        name = part.split("\n", 1)[0].strip()
        found = _INSTRUCTION.findall(part)
        code = tuple(Instruction(int(a, 16), p.strip(), full, rest.strip()) for a, p, full, rest in found)
        functions.append(Function(name, code))
    return functions


def read_cubin(cubin: bytes) -> tuple[Function, int, int]:
    """The one function of a compiled kernel, its registers a thread and its bytes of stack a thread (spills)."""
    handle, name = tempfile.mkstemp(suffix=".cubin")
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin)
        function = disassemble(path)[0]
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", name], capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    found = _RESOURCES.search(usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    return function, int(found[1]), int(found[2])

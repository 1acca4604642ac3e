"""PTX text to `Program`.

The grammar is the part of NVIDIA's PTX ISA that compilers emit: one `.entry`, register and variable declarations,
labels, instructions with an optional guard, nested `{ }` scopes (inline assembly declares its own registers in one),
`.loc` and `.file` for source lines. Directives that change no result (`.pragma`, debug sections) are skipped.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePath

from .errors import PtxSyntaxError
from .program import (
    SIZES,
    Address,
    Immediate,
    Instruction,
    Not,
    Operand,
    Pair,
    Parameter,
    Predicate,
    Program,
    Register,
    SharedVariable,
    Symbol,
    Vector,
)
from .tokens import DECIMAL, NUMBER, number, split, statements

# The address of a block's first shared variable. Not 0, as on the hardware, so that a forgotten base shows; a multiple
# of what the matrix instructions' swizzles repeat in.
SHARED_BASE = 1024

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*([^{]*)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+(?P<words>[.\w\s]*?)(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?\s*$")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
_LOCAL = re.compile(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?")
_GUARD = re.compile(r"@(!?)([\w$%.]+)\s+(.*)", re.S)
_BEGIN_ASM, _END_ASM = "begin inline asm", "end inline asm"


# A kernel is launched again and again.
@lru_cache(maxsize=128)
def parse(ptx: str) -> Program:
    """The kernel in `ptx`.

    Raises:
        PtxSyntaxError: there is not one entry, or a statement is not understood.
    """
    files = {int(n): PurePath(path).name for n, path in _FILE.findall(ptx)}
    code = _without_comments(ptx)
    entries = list(_ENTRY.finditer(code))
    if len(entries) != 1:
        raise PtxSyntaxError(f"a program must have one .entry, found {len(entries)}")
    entry = entries[0]
    target = re.search(r"\.target\s+(\w+)", code)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+(?:\s*,\s*\d+)*)", entry[3])
    body = _Body(files)
    for variable in _SHARED.finditer(code[: entry.start()]):
        body.declare_shared(variable)
    body.read(_body(code, entry.end()))
    return Program(
        name=entry[1],
        target=target[1] if target else "",
        parameters=_parameters(entry[2]),
        instructions=tuple(body.instructions),
        registers=body.registers,
        shared=_with_extern_last(body.shared),
        labels=body.labels,
        threads=_product(threads[1]) if threads else None,
        local=body.local,
        local_bytes=body.local_bytes,
    )


def _without_comments(ptx: str) -> str:
    """The text with comments blanked, but for the marks around inline assembly, which become directives."""
    ptx = re.sub(r"/\*.*?\*/", " ", ptx, flags=re.S)
    ptx = re.sub(rf"//\s*{_BEGIN_ASM}\s*$", ".asm_begin;", ptx, flags=re.M)
    ptx = re.sub(rf"//\s*{_END_ASM}\s*$", ".asm_end;", ptx, flags=re.M)
    return re.sub(r"//[^\n]*", "", ptx)


def _body(code: str, start: int) -> str:
    depth = 1
    for i in range(start, len(code)):
        depth += {"{": 1, "}": -1}.get(code[i], 0)
        if not depth:
            return code[start:i]
    raise PtxSyntaxError("the entry's body has no closing brace")


def _product(text: str) -> int:
    result = 1
    for part in text.split(","):
        result *= int(part)
    return result


def _parameters(text: str) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    offset = 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.match(declaration)
        words = match["words"].split() if match else []
        kind = next((w[1:] for w in words if w[1:] in SIZES), None)
        if match is None or kind is None:
            raise PtxSyntaxError(f"parameter not understood: {declaration!r}")
        size = SIZES[kind] * int(match["count"] or 1)
        # `.ptr .align` is the alignment of what is pointed at; a plain `.align` is the parameter's own.
        own = ".align" in words and ".ptr" not in words
        align = int(words[words.index(".align") + 1]) if own else SIZES[kind]
        offset = -(-offset // align) * align
        found.append(Parameter(match["name"], kind, size, offset, ".ptr" in words))
        offset += size
    return tuple(found)


def _with_extern_last(shared: dict[str, SharedVariable]) -> dict[str, SharedVariable]:
    """Addresses: sized variables first, then what the launch sizes, all at one place as the ISA has it."""
    placed: dict[str, SharedVariable] = {}
    at = SHARED_BASE
    for v in sorted(shared.values(), key=lambda v: v.size == 0):
        # A launch's buffer starts where the swizzles do.
        align = v.align if v.size else max(v.align, SHARED_BASE if at > SHARED_BASE else v.align)
        at = -(-at // align) * align
        placed[v.name] = SharedVariable(v.name, v.size, v.align, at)
        at += v.size
    return placed


class _Body:
    """Reads the statements of an entry."""

    def __init__(self, files: dict[int, str]) -> None:
        self.files = files
        self.instructions: list[Instruction] = []
        self.registers: dict[str, str] = {}
        self.shared: dict[str, SharedVariable] = {}
        self.local: dict[str, int] = {}
        self.local_bytes = 0
        self.labels: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0
        self.source: tuple[str, int] | None = None
        self.caller: tuple[str, int] | None = None
        self.inline = False

    def read(self, text: str) -> None:
        """Every statement of `text`."""
        for statement in statements(text):
            if statement == "{":
                self.scopes.append({})
                self.scope_count += 1
            elif statement == "}":
                self.scopes.pop()
            elif statement.startswith("."):
                self._directive(statement)
            elif statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.instructions)
            else:
                self._instruction(statement)

    def declare_shared(self, match: re.Match[str]) -> None:
        """A variable in shared memory; `[]` is sized by the launch."""
        align, kind, name, count = match.groups()
        size = SIZES[kind] * (1 if count is None else int(count or 0))
        self.shared[name] = SharedVariable(name, size, int(align or SIZES[kind]), 0)

    def _directive(self, text: str) -> None:
        word = text.split(None, 1)[0]
        if word == ".reg":
            self._declare_registers(text)
        elif word == ".loc":
            match = _LOC.match(text)
            if match:
                self.source = self._place(match[1], match[2])
                self.caller = self._place(match[3], match[4]) if match[3] else None
        elif word in (".asm_begin", ".asm_end"):
            self.inline = word == ".asm_begin"
        elif shared := _SHARED.match(text):
            self.declare_shared(shared)
        elif local := _LOCAL.match(text):
            align, size = int(local[1] or SIZES[local[2]]), SIZES[local[2]] * int(local[4] or 1)
            self.local[local[3]] = at = -(-self.local_bytes // align) * align
            self.local_bytes = at + size
        elif word not in (".pragma", ".file", ".section"):
            raise PtxSyntaxError(f"directive not understood: {text!r}")

    def _place(self, file: str, line: str) -> tuple[str, int]:
        return self.files.get(int(file), f"file {file}"), int(line)

    def _declare_registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()  # type: ignore[union-attr]
        for name in (n.strip() for n in names.split(",")):
            counted = re.match(r"(.*)<(\d+)>$", name)
            for n in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
                unique = n if len(self.scopes) == 1 else f"{n}${self.scope_count}"
                self.scopes[-1][n] = unique
                self.registers[unique] = kind

    def _instruction(self, text: str) -> None:
        text = " ".join(text.split())
        guard = _GUARD.match(text)
        predicate = Predicate(self._register(guard[2]).name, bool(guard[1])) if guard else None
        mnemonic, _, rest = (guard[3] if guard else text).partition(" ")
        opcode, *words = mnemonic.split(".")
        self.instructions.append(
            Instruction(
                index=len(self.instructions),
                opcode=opcode,
                modifiers=tuple(w for w in words if w not in SIZES),
                types=tuple(w for w in words if w in SIZES),
                operands=tuple(self._operand(part) for part in split(rest)),
                predicate=predicate,
                source=self.source,
                caller=self.caller,
                inline=self.inline,
                text=text,
            )
        )

    def _register(self, name: str) -> Register:
        found = self._find(name)
        if found is None:
            raise PtxSyntaxError(f"register {name!r} is not declared")
        return Register(found)

    def _find(self, name: str) -> str | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if text.startswith("!"):
            return Not(self._register(text[1:].strip()))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        if NUMBER.match(text) or DECIMAL.match(text):
            return Immediate(number(text))
        found = self._find(text)
        if found is not None or text.startswith("%") or text == "_":
            return Register(found or text)
        return Symbol(text)

    def _address(self, text: str) -> Operand:
        if "," in text:
            return Vector(tuple(self._operand(part) for part in split(text)))
        match = re.match(r"([^\s+]+)\s*(?:\+\s*(-?\s*\w+))?\s*$", text)
        if match is None:
            raise PtxSyntaxError(f"address not understood: [{text}]")
        base = self._operand(match[1])
        assert isinstance(base, Register | Symbol | Immediate), text
        return Address(base, int((match[2] or "0").replace(" ", ""), 0))

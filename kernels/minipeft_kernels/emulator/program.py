"""A PTX kernel as data: what `parse` returns and everything else reads."""

from __future__ import annotations

from dataclasses import dataclass, field

# Bytes of one value. Packed types count whole; b1 and pred are kept as one byte each.
SIZES = {
    **{"pred": 1, "b1": 1, "b8": 1, "u8": 1, "s8": 1, "e4m3": 1, "e5m2": 1},
    **{"b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "e4m3x2": 2, "e5m2x2": 2},
    **{"b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "u16x2": 4, "s16x2": 4},
    **{"b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8, "b128": 16},
}


@dataclass(frozen=True)
class Register:
    """A register by the name it has in `Program.registers`, or a special one such as "%tid.x"."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant. An int, or a float where the text is a decimal fraction or has the prefix 0f or 0d."""

    value: int | float


@dataclass(frozen=True)
class Symbol:
    """A parameter, a variable in shared memory, or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """`{a, b, ..}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass(frozen=True)
class Pair:
    """`d|p`: a result with the predicate that goes with it."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """`!p`."""

    operand: Register


Operand = Register | Immediate | Symbol | Vector | Address | Pair | Not


@dataclass(frozen=True)
class Predicate:
    """`@p` or `@!p`."""

    register: str
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        index: its place in `Program.instructions`.
        opcode: "ld". modifiers: ("global", "v4"), in order. types: ("b32",), in order.
        operands: results first. predicate: its guard.
        source: (file, line) of the Python that it was compiled from. caller: of the call that this line was inlined
            at, or None. inline: it stands in an `asm` of the Triton kernel or of Triton's own lowering.
        text: as written, on one line.
    """

    index: int
    opcode: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Predicate | None
    source: tuple[str, int] | None
    caller: tuple[str, int] | None
    inline: bool
    text: str

    @property
    def mnemonic(self) -> str:
        """The opcode with everything that follows it, without guard and operands."""
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]

    @property
    def space(self) -> str:
        """State space of a load, store or atomic: "global", "shared", "local", "param" or "generic"."""
        for modifier in self.modifiers:
            if modifier.split("::")[0] in ("global", "shared", "local", "param", "const"):
                return modifier.split("::")[0]
        return "generic"

    @property
    def place(self) -> str:
        """For messages: the text and where it comes from."""
        where = f", {self.source[0]}:{self.source[1]}" if self.source else ""
        return f"`{self.text}` (instruction {self.index}{where})"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the kernel: `size` bytes at `offset` in the parameters' space; type as declared, such as "u64"."""

    name: str
    type: str
    size: int
    offset: int
    pointer: bool = False


@dataclass(frozen=True)
class SharedVariable:
    """A variable in shared memory. `size` is 0 for `.extern`, whose size the launch gives. address: in the block."""

    name: str
    size: int
    align: int
    address: int


@dataclass(frozen=True)
class Program:
    """One kernel.

    Attributes:
        name: of the entry. target: "sm_80". parameters, instructions: in order.
        registers: name -> declared type; registers of an inner scope are renamed `name$n`.
        shared: variables in shared memory. local_bytes: of `.local` variables a thread. local: their addresses.
        labels: name -> index of the instruction behind it. threads: from .reqntid (or .maxntid), or None.
    """

    name: str
    target: str
    parameters: tuple[Parameter, ...]
    instructions: tuple[Instruction, ...]
    registers: dict[str, str]
    shared: dict[str, SharedVariable]
    labels: dict[str, int]
    threads: int | None
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameters' space."""
        return max((p.offset + p.size for p in self.parameters), default=0)

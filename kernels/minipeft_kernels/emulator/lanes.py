"""The state of the lanes of a batch, and operands as vectors over them.

Every register is one array over all lanes. An instruction works on all lanes (`lanes` is None) or on those that an
ascending index array names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .memory import WORDS
from .observer import Batch, Launch
from .parse import SHARED_BASE
from .program import SIZES, Address, Immediate, Not, Operand, Register, Symbol, Vector

WARP = 32
BOOL = np.dtype(bool)
ANY = np.ndarray | None
Read = Callable[[ANY], np.ndarray]
Write = Callable[[ANY, np.ndarray], None]

# The numpy dtype that a value of a type is computed in. bfloat16, tf32 and packed types are bits: their operations
# unpack them.
_KINDS = {"u": "u", "b": "u", "s": "i", "f": "f"}
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(f"{_KINDS.get(name[0], 'u')}{size}")
    for name, size in SIZES.items()
    if name not in ("pred", "b1", "b128", "bf16", "bf16x2", "f16x2", "f32x2", "tf32", "s16x2", "u16x2")
    and name[0] != "e"
}
DTYPES |= dict.fromkeys(("bf16", "e4m3x2", "e5m2x2"), np.dtype("u2"))
DTYPES |= dict.fromkeys(("bf16x2", "f16x2", "tf32", "u16x2", "s16x2"), np.dtype("u4")) | {"f32x2": np.dtype("u8")}
DTYPES |= {"pred": np.dtype(bool), "b1": np.dtype(bool), "b128": np.dtype(np.complex128)}

_AXES = ("x", "y", "z")
# Bytes between the shared memories of two blocks, at least: a multiple of every access's size.
_SHARED_ALIGN = 1024


class Lanes:
    """Registers, shared and local memory of the blocks of a batch.

    Attributes:
        count: lanes. blocks, threads: in the batch, and of a block.
        registers: name -> (lanes,) array. shared: uint8, one block's memory behind the other.
        shared_base: (lanes,) what to add to an address in the block for an index into `shared`.
    """

    def __init__(self, launch: Launch, blocks: int, parameters: bytes) -> None:
        program = launch.program
        self.launch = launch
        self.blocks, self.threads = blocks, launch.threads
        self.count = blocks * launch.threads
        self.everyone = np.arange(self.count)
        self.registers: dict[str, np.ndarray] = {
            name: np.zeros(self.count, bool if kind == "pred" else WORDS[SIZES[kind]])
            for name, kind in program.registers.items()
        }
        self.shared_bytes = launch.all_shared_bytes
        self.shared_stride = -(-max(self.shared_bytes, 1) // _SHARED_ALIGN) * _SHARED_ALIGN
        self.shared = np.zeros(blocks * self.shared_stride, np.uint8)
        self.shared_words: dict[int, np.ndarray] = {size: self.shared.view(word) for size, word in WORDS.items()}
        self.shared_base = np.repeat(np.arange(blocks) * self.shared_stride - SHARED_BASE, self.threads)
        self.local_stride = -(-max(program.local_bytes, 1) // 16) * 16
        self.local = np.zeros(self.count * self.local_stride if program.local_bytes else 0, np.uint8)
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.clock = 0
        self._special = self._special_registers()

    def start(self, indices: np.ndarray) -> None:
        """Ready for blocks, by their linear indices (x fastest). Old shared memory is a pattern of bits."""
        self.batch = Batch(indices, self.launch, self.registers)
        axes = zip(*(self.launch.place(i) for i in indices.tolist()), strict=True)
        for axis, values in zip(_AXES, axes, strict=True):
            self._special[f"%ctaid.{axis}"][:] = np.repeat(values, self.threads)
        self.shared.fill(0xFF)
        self.local.fill(0xFF)

    def indices(self, lanes: ANY) -> np.ndarray:
        """The lanes as an index array."""
        return self.everyone if lanes is None else lanes

    def describe(self, lane: int) -> str:
        """A lane in words: its block and thread."""
        return self.batch.describe(lane)

    def read(self, operand: Operand, kind: str) -> Read:
        """A source operand of an instruction's type, as a function of the lanes that gives its values."""
        if isinstance(operand, Not):
            inner = self.read(operand.operand, "pred")
            return lambda lanes: ~inner(lanes)
        if isinstance(operand, Immediate | Symbol):
            constant = self._constant(operand, kind)
            return lambda lanes: constant
        if not isinstance(operand, Register):
            raise TypeError(f"not a value: {operand}")
        if operand.name in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo"):
            return lambda lanes: np.array([self.clock], np.uint64).astype(DTYPES[kind])
        values = self.values(operand.name, kind)
        return lambda lanes: values if lanes is None else values[lanes]

    def values(self, name: str, kind: str) -> np.ndarray:
        """A register's array as a type; the low part where the register is wider. A view: it follows the register."""
        array = self.registers[name] if name in self.registers else self._special[name]
        dtype = DTYPES[kind]
        if array.dtype == dtype:
            return array
        if BOOL in (dtype, array.dtype) or array.dtype.itemsize < dtype.itemsize:
            raise TypeError(f"register {name} of {8 * array.dtype.itemsize} bits is read as {kind}")
        return array.view(dtype)[:: array.dtype.itemsize // dtype.itemsize]

    def constant(self, operand: Operand) -> int | None:
        """The value of an integer constant, None for anything else."""
        if isinstance(operand, Immediate) and isinstance(operand.value, int):
            return operand.value
        return None

    def write(self, operand: Operand, kind: str) -> Write:
        """A destination of an instruction's type; a wider register gets the value extended by the type's sign."""
        if not isinstance(operand, Register):
            raise TypeError(f"not a register: {operand}")
        if operand.name == "_":
            return lambda lanes, values: None
        array = self.registers[operand.name]
        dtype = DTYPES[kind]
        if (dtype == BOOL) != (array.dtype == BOOL) or array.dtype.itemsize < dtype.itemsize:
            raise TypeError(f"register {operand.name} of {8 * array.dtype.itemsize} bits is written as {kind}")
        if array.dtype.itemsize == dtype.itemsize:
            target = array.view(dtype)
        else:
            target = array.view(np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{array.dtype.itemsize}"))

        def write(lanes: ANY, values: np.ndarray) -> None:
            target[... if lanes is None else lanes] = values

        return write

    def address(self, operand: Operand) -> Read:
        """`[base + offset]` as int64 addresses, (n,) also where the base is a constant."""
        if not isinstance(operand, Address):
            raise TypeError(f"not an address: {operand}")
        offset = operand.offset
        base = operand.base
        if isinstance(base, Register):
            kind = {4: "u32", 8: "s64"}[self.registers[base.name].dtype.itemsize]
            values = self.values(base.name, kind)

            def read(lanes: ANY) -> np.ndarray:
                found = values if lanes is None else values[lanes]
                if found.dtype != np.int64:
                    found = found.astype(np.int64)
                return found + offset if offset else found

            return read
        start = int(self._constant(base, "u64")[0]) + offset
        return lambda lanes: np.full(self.count if lanes is None else lanes.size, start, np.int64)

    def _constant(self, operand: Immediate | Symbol, kind: str) -> np.ndarray:
        dtype = DTYPES[kind]
        if isinstance(operand, Symbol):
            return np.array([self._place(operand.name)], np.int64).astype(dtype)
        value = operand.value
        if kind == "pred":
            return np.array([value != 0])
        if isinstance(value, float):
            kept = np.array([value], {2: np.float16, 4: np.float32, 8: np.float64}[dtype.itemsize])
            return kept.view(dtype) if dtype.kind != "f" else kept
        bits = value & ((1 << 8 * dtype.itemsize) - 1)
        kept = np.array([bits], np.uint64).astype(f"u{dtype.itemsize}").view(dtype)
        return kept

    def _place(self, name: str) -> int:
        program = self.launch.program
        if name in program.shared:
            return program.shared[name].address
        if name in program.local:
            return program.local[name]
        raise TypeError(f"unknown symbol {name}")

    def _special_registers(self) -> dict[str, np.ndarray]:
        thread = self.everyone % self.threads
        lane = (thread % WARP).astype(np.uint64)
        one = np.uint64(1)
        width, height, depth = self.launch.grid
        values: dict[str, np.ndarray | int] = {
            **{"%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1},
            **{f"%ctaid.{axis}": 0 for axis in _AXES},
            **{"%nctaid.x": width, "%nctaid.y": height, "%nctaid.z": depth},
            **{"%laneid": lane, "%warpid": thread // WARP, "%nwarpid": self.threads // WARP, "WARP_SZ": WARP},
            **{"%smid": 0, "%nsmid": 1, "%gridid": 0, "%cluster_ctarank": 0, "%cluster_nctarank": 1},
            **{"%dynamic_smem_size": self.launch.shared_bytes, "%total_smem_size": self.shared_bytes},
            "%lanemask_eq": one << lane,
            "%lanemask_lt": (one << lane) - one,
            "%lanemask_le": (one << lane + one) - one,
            "%lanemask_gt": 0xFFFFFFFF ^ ((one << lane + one) - one).astype(np.int64),
            "%lanemask_ge": 0xFFFFFFFF ^ ((one << lane) - one).astype(np.int64),
        }
        return {name: np.broadcast_to(v, self.count).astype(np.uint32) for name, v in values.items()}


def pick(condition: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """np.where, with a type that says that an array comes back."""
    return np.where(condition, yes, no)


def elements(operand: Operand) -> tuple[Operand, ...]:
    """The items of a vector operand, or the operand alone."""
    return operand.items if isinstance(operand, Vector) else (operand,)

"""Loads and stores (PTX ISA 9.7.9); atomics are in `atomics.py`.

Caches are not modelled: cache and eviction modifiers, and L2 policies, change nothing. Stores are seen by every thread
from the next instruction on, in the order in which lanes run: what a GPU may reorder is for the race check to find.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .lanes import ANY, DTYPES, elements
from .memory import WORDS, Fault
from .parse import SHARED_BASE
from .program import SIZES, Address, Instruction, Operand, Symbol
from .registry import Context, Execute, only, opcode, pure, refused, unsupported

SPACES = ("global", "shared", "shared::cta", "local", "param", "const", "param::entry")
CACHE = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "relaxed", "acquire", "release", "weak", "mmio"),
    *("gpu", "cta", "sys", "cluster", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L1::evict_normal"),
    *("L1::evict_unchanged", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first"),
    *("L2::evict_last", "L2::evict_normal"),
)
VECTORS = ("v2", "v4", "v8")


class Shared:
    """Accesses to the blocks' shared memories."""

    def __init__(self, context: Context) -> None:
        self.lanes = context.lanes

    def index(self, lanes: ANY, addresses: np.ndarray, size: int) -> np.ndarray:
        """The places of the bytes in `Lanes.shared`, in units of `size`. Raises `Fault`."""
        end = SHARED_BASE + self.lanes.shared_bytes
        if size > 1 and np.bitwise_or.reduce(addresses) & (size - 1):
            self._refuse(addresses, addresses & (size - 1) != 0, f"no multiple of {size}")
        if addresses.min() < SHARED_BASE or addresses.max() + size > end:
            outside = (addresses < SHARED_BASE) | (addresses + size > end)
            self._refuse(addresses, outside, f"out of its {self.lanes.shared_bytes} bytes")
        base = self.lanes.shared_base if lanes is None else self.lanes.shared_base[lanes]
        flat = base + addresses
        return flat // size if size > 1 else flat

    def _refuse(self, addresses: np.ndarray, wrong: np.ndarray, why: str) -> None:
        position = int(np.flatnonzero(wrong)[0])
        raise Fault(position, f"shared memory is accessed at byte {int(addresses[position]) - SHARED_BASE}, {why}")

    def load(self, lanes: ANY, addresses: np.ndarray, size: int) -> np.ndarray:
        """(n,) words. Raises `Fault`."""
        return self.lanes.shared_words[size][self.index(lanes, addresses, size)]

    def store(self, lanes: ANY, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write (n,) words. Raises `Fault`."""
        size = values.dtype.itemsize
        self.lanes.shared_words[size][self.index(lanes, addresses, size)] = values


class Space:
    """One state space, with who watches accesses to it."""

    def __init__(self, instruction: Instruction, context: Context) -> None:
        name = instruction.space
        self.instruction, self.context = instruction, context
        self.shared = Shared(context) if name == "shared" else None
        self.local = name == "local"
        if name not in ("global", "generic", "shared", "local", "const"):
            raise unsupported(instruction, f"state space {name}")
        watchers = {"shared": context.shared_watchers, "local": []}.get(name, context.global_watchers)
        hook = "shared_access" if self.shared else "global_access"
        self.watchers: list[Callable[..., None]] = [getattr(w, hook) for w in watchers]

    def load(self, lanes: ANY, addresses: np.ndarray, size: int, kind: str = "load") -> np.ndarray:
        """(n,) words of memory, n > 0. Raises AccessError."""
        if self.watchers:
            self.watch(lanes, addresses, size, kind)
        try:
            if self.shared is not None:
                return self.shared.load(lanes, addresses, size)
            if self.local:
                return self._local(size)[self._local_index(lanes, addresses, size)]
            return self.context.memory.load(addresses, size)
        except Fault as fault:
            raise refused(self.context, self.instruction, lanes, fault) from None

    def store(self, lanes: ANY, addresses: np.ndarray, values: np.ndarray, watched: bool = True) -> None:
        """Write (n,) words. Raises AccessError."""
        if self.watchers and watched:
            self.watch(lanes, addresses, values.dtype.itemsize, "store")
            for watcher in self.context.store_watchers:
                space = "global" if self.shared is None else "shared"
                watcher.stored(self.instruction, space, self.context.lanes.indices(lanes), addresses, values)
        try:
            if self.shared is not None:
                self.shared.store(lanes, addresses, values)
            elif self.local:
                size = values.dtype.itemsize
                self._local(size)[self._local_index(lanes, addresses, size)] = values
            else:
                self.context.memory.store(addresses, values)
        except Fault as fault:
            raise refused(self.context, self.instruction, lanes, fault) from None

    def watch(self, lanes: ANY, addresses: np.ndarray, size: int, kind: str) -> None:
        """Tell the observers; an access that memory refuses is refused first."""
        try:
            if self.shared is not None:
                self.shared.index(lanes, addresses, size)
            else:
                self.context.memory.parts(addresses, size)
        except Fault as fault:
            raise refused(self.context, self.instruction, lanes, fault) from None
        for hook in self.watchers:
            hook(self.instruction, kind, self.context.lanes.indices(lanes), addresses, size)

    def _local(self, size: int) -> np.ndarray:
        return self.context.lanes.local.view(WORDS[size])

    def _local_index(self, lanes: ANY, addresses: np.ndarray, size: int) -> np.ndarray:
        stride = self.context.lanes.local_stride
        outside = (addresses < 0) | (addresses + size > stride) | (addresses % size != 0)
        if outside.any():
            raise Fault(int(np.flatnonzero(outside)[0]), "local memory is accessed out of bounds or misaligned")
        return (self.context.lanes.indices(lanes) * stride + addresses) // size


def _check_operands(instruction: Instruction, expected: int) -> None:
    """A load or store may have an L2 policy behind its operands."""
    extra = 1 if "L2::cache_hint" in instruction.modifiers else 0
    if len(instruction.operands) != expected + extra:
        raise unsupported(instruction, f"expected {expected + extra} operands")


@opcode("ld", "ldu")
def build_load(instruction: Instruction, context: Context) -> Execute:
    """ld, of vectors too."""
    mods = only(instruction, (*SPACES, *CACHE, *VECTORS))
    _check_operands(instruction, 2)
    kind = instruction.types[0]
    if mods & {"param", "param::entry"}:
        return _load_parameter(instruction, context, kind)
    targets = elements(instruction.operands[0])
    total = SIZES[kind] * len(targets)
    if total > 16:
        return _split_load(instruction, context, targets, kind)
    writes = [context.lanes.write(t, kind) for t in targets]
    address = context.lanes.address(instruction.operands[1])
    space = Space(instruction, context)
    dtype = DTYPES[kind]

    def single(lanes: ANY) -> None:
        writes[0](lanes, space.load(lanes, address(lanes), total).view(dtype))

    def vector(lanes: ANY) -> None:
        words = space.load(lanes, address(lanes), total).view(dtype).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(lanes, words[:, i])

    return single if len(targets) == 1 else vector


def _split_load(instruction: Instruction, context: Context, targets: tuple[Operand, ...], kind: str) -> Execute:
    """A vector of 32 bytes, in two halves."""
    half = len(targets) // 2
    address = context.lanes.address(instruction.operands[1])
    writes = [context.lanes.write(t, kind) for t in targets]
    space = Space(instruction, context)
    size = SIZES[kind] * half

    def execute(lanes: ANY) -> None:
        start = address(lanes)
        for part in range(2):
            words = space.load(lanes, start + part * size, size).view(DTYPES[kind]).reshape(-1, half)
            for i in range(half):
                writes[part * half + i](lanes, words[:, i])

    return execute


def _load_parameter(instruction: Instruction, context: Context, kind: str) -> Execute:
    address = instruction.operands[1]
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise unsupported(instruction, "a parameter is read by its name")
    parameters = {p.name: p.offset for p in context.lanes.launch.program.parameters}
    start = parameters[address.base.name] + address.offset
    targets = elements(instruction.operands[0])
    size = SIZES[kind]
    parts = []
    for i, target in enumerate(targets):
        raw = context.lanes.parameters[start + i * size : start + (i + 1) * size]
        parts.append((context.lanes.write(target, kind), raw.copy().view(DTYPES[kind])))

    def execute(lanes: ANY) -> None:
        for write, value in parts:
            write(lanes, value)

    return execute


@opcode("st")
def build_store(instruction: Instruction, context: Context) -> Execute:
    """st, of vectors too."""
    only(instruction, (*SPACES, *CACHE, *VECTORS))
    _check_operands(instruction, 2)
    kind = instruction.types[0]
    sources = elements(instruction.operands[1])
    bits = f"b{8 * SIZES[kind]}"
    reads = [context.lanes.read(s, kind) for s in sources]
    address = context.lanes.address(instruction.operands[0])
    space = Space(instruction, context)
    total = SIZES[kind] * len(sources)
    parts = -(-total // 16)
    each = len(sources) // parts
    word = WORDS[min(total, 16)]
    dtype = DTYPES[bits]

    def execute(lanes: ANY) -> None:
        start = address(lanes)
        for part in range(parts):
            values = np.empty((start.size, each), dtype)
            for i, read in enumerate(reads[part * each : (part + 1) * each]):
                values[:, i] = read(lanes).view(dtype)
            space.store(lanes, start + 16 * part if part else start, values.view(word)[:, 0])

    return execute


@opcode("prefetch", "prefetchu", "createpolicy", "applypriority", "discard")
def build_hint(instruction: Instruction, context: Context) -> Execute:
    """Caches are not modelled; a policy is a number that nothing reads."""
    if instruction.opcode == "createpolicy":
        write = context.lanes.write(instruction.operands[0], "b64")
        return lambda lanes: write(lanes, np.zeros(1, np.uint64))
    return lambda lanes: None


@opcode("fence", "membar")
def build_fence(instruction: Instruction, context: Context) -> Execute:
    """Fences order what is in order here already."""
    return lambda lanes: None


@opcode("isspacep")
def build_isspace(instruction: Instruction, context: Context) -> Execute:
    """Every generic address here is a global one."""
    (space,) = only(instruction, ("global", "shared", "local", "const"))
    return pure(instruction, context, lambda a: np.full(a.shape, space == "global"), ("b64",), "pred")

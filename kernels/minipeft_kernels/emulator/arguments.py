"""The arguments of a launch: parameters as bit patterns, and tensors as regions of the GPU's memory.

Tensors lie at made-up addresses a terabyte apart, so that an access which leaves one never lands in another, with the
alignment that they truly have, since Triton compiled for it. A tensor that a kernel reaches through a table of
addresses (an optimizer's, say) lies where it truly is, and must be announced: nothing else tells that it is meant.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Torch aligns to 64 bytes, CUDA to 256; Triton asks for 16. The low bits of an address are kept.
KEPT_BITS = 0xFFF
GAP = 1 << 40

_INTEGER_BITS = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "u1": 8, "u8": 8, "u16": 16, "u32": 32, "u64": 64}
_FLOAT_CODES = {"fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"}


@dataclass
class Region:
    """Bytes that a kernel may use: a tensor's whole storage, by the names of the arguments that lie in it."""

    address: int
    array: np.ndarray
    # Of the storage on this machine, or 0 for scratch memory.
    key: int
    names: list[str] = field(default_factory=list)
    initialized: bool = True

    @property
    def name(self) -> str:
        """Of the arguments, as an error shows it."""
        return "/".join(self.names)


def pack(name: str, kind: str, value: Any) -> bytes:
    """The bytes of a scalar parameter.

    Args:
        name: of the parameter. kind: Triton's type, such as "i32" or "fp32". value: a number.

    Raises:
        TypeError: a type that kernels are not given here. OverflowError: the number does not fit.
    """
    if kind in _INTEGER_BITS:
        bits = _INTEGER_BITS[kind]
        number = int(value)
        if not -(1 << (bits - 1)) <= number < 1 << bits:
            raise OverflowError(f"argument {name} = {number} does not fit {kind}")
        return (number & ((1 << bits) - 1)).to_bytes(bits // 8, "little")
    if kind in _FLOAT_CODES:
        return struct.pack("<" + _FLOAT_CODES[kind], float(value))
    if kind == "bf16":
        return bytes(torch.tensor([float(value)]).bfloat16().view(torch.uint8).tolist())
    raise TypeError(f"argument {name} has type {kind}, which cannot be given to an emulated kernel")


class AddressSpace:
    """The places in device memory of the tensors of one launch.

    Args:
        reachable: by name, tensors that the kernel reaches through addresses in memory.
    """

    def __init__(self, reachable: Mapping[str, Tensor] | None = None) -> None:
        self._regions: dict[int, Region] = {}
        for name, tensor in (reachable or {}).items():
            self._region(name, tensor, true_address=True)

    @property
    def regions(self) -> Iterable[Region]:
        """Each storage once."""
        return self._regions.values()

    def pointer(self, name: str, value: Any) -> int:
        """The value of a pointer parameter: the address of a tensor, or of `triton.reinterpret`'s result; 0 for None.

        Raises:
            TypeError: no tensor. ValueError: a tensor that is not on the CPU.
        """
        if value is None:
            return 0
        base = getattr(value, "base", value)
        if not isinstance(base, Tensor):
            raise TypeError(f"argument {name} must be a tensor, got {type(value).__name__}")
        region = self._region(name, base)
        return region.address + base.data_ptr() - base.untyped_storage().data_ptr()

    def scratch(self, name: str, size: int) -> Region:
        """Room that the kernel asked for: `size` bytes, never written."""
        region = Region((len(self._regions) + 1) * GAP, np.zeros(size, np.uint8), 0, [name], initialized=False)
        self._regions[-1 - len(self._regions)] = region
        return region

    def _region(self, name: str, tensor: Tensor, true_address: bool = False) -> Region:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}: an emulated kernel takes tensors on the CPU")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} has layout {tensor.layout}: an emulated kernel takes dense tensors")
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        region = self._regions.get(start)
        if region is None:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            address = start if true_address else (len(self._regions) + 1) * GAP + (start & KEPT_BITS)
            region = self._regions[start] = Region(address, flat.numpy(), start)
        if name not in region.names:
            region.names.append(name)
        return region

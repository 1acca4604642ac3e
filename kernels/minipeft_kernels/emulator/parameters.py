"""A launch's arguments as the bytes of the kernel's parameter space."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .program import Parameter


def pack_arguments(parameters: Sequence[Parameter], arguments: Sequence[int | float | bytes]) -> bytes:
    """The parameters' space.

    Raises:
        ValueError: the number of arguments, or the size of one, is not the parameters'.
    """
    if len(parameters) != len(arguments):
        raise ValueError(f"the kernel has {len(parameters)} parameters, got {len(arguments)} arguments")
    space = bytearray(max((p.offset + p.size for p in parameters), default=0))
    for parameter, value in zip(parameters, arguments, strict=True):
        space[parameter.offset : parameter.offset + parameter.size] = _bytes_of(parameter, value)
    return bytes(space)


def _bytes_of(parameter: Parameter, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        if len(value) != parameter.size:
            raise ValueError(f"{parameter.name} has {parameter.size} bytes, got {len(value)}")
        return value
    if isinstance(value, float):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[parameter.size], value)
    return (int(value) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")

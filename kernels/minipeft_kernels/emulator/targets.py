"""The architectures that kernels are compiled for, such as "sm_80", and what one of their multiprocessors holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """The room of one multiprocessor of a capability: registers, bytes of shared memory, warps and blocks."""

    registers: int
    shared: int
    shared_block: int
    warps: int
    blocks: int


# CUDA C++ Programming Guide, technical specifications per compute capability. 1 KB a block is the system's.
MULTIPROCESSORS = {
    80: Multiprocessor(65536, 164 << 10, 163 << 10, 64, 32),
    86: Multiprocessor(65536, 100 << 10, 99 << 10, 48, 16),
    89: Multiprocessor(65536, 100 << 10, 99 << 10, 48, 24),
    90: Multiprocessor(65536, 228 << 10, 227 << 10, 64, 32),
    100: Multiprocessor(65536, 228 << 10, 227 << 10, 64, 32),
    120: Multiprocessor(65536, 100 << 10, 99 << 10, 48, 24),
}


def capability_of(target: str) -> int:
    """80 for "sm_80".

    Raises:
        ValueError: not a target that is known here.
    """
    digits = target.removeprefix("sm_")
    if not digits.isdigit() or int(digits) not in MULTIPROCESSORS:
        known = ", ".join(f"sm_{c}" for c in MULTIPROCESSORS)
        raise ValueError(f"target must be one of {known}, got {target!r}")
    return int(digits)

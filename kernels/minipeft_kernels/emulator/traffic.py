"""The cost of one access of a warp in memory: sectors of global memory, wavefronts of shared memory.

Global memory moves in sectors of 32 bytes: an access costs as many as its lanes touch, and at least as many as its
distinct bytes fill (CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory").

Shared memory has 32 banks of 4 bytes. A pass, a *wavefront*, takes one word from each: lanes that want different words
of one bank take several passes, lanes that want the same word share one. Accesses of 8 bytes go by half warps, of 16
bytes by quarters (CUDA C++ Programming Guide, "Shared Memory", and NVIDIA's profiler, which counts so).
"""

from __future__ import annotations

import numpy as np

SECTOR = 32
BANKS = 32
WORD = 4
LANES = 32

_NOWHERE = np.int64(-1)


def sectors(addresses: np.ndarray, size: int, active: np.ndarray) -> tuple[int, int]:
    """Sectors of a global access, and the fewest that its bytes fit in.

    Args:
        addresses: int64 (warps, 32), multiples of `size`. size: bytes a lane. active: bool (warps, 32).

    Returns:
        Both summed over warps: (touched, least possible).
    """
    addresses = np.where(active, addresses, _NOWHERE)
    last = np.where(active, addresses + size - 1, _NOWHERE)
    width = 1 + max(0, (size - 1) // SECTOR)
    first = np.where(active, addresses // SECTOR, _NOWHERE)
    touched = [np.where(active, np.minimum(first + i, last // SECTOR), _NOWHERE) for i in range(width)]
    distinct = distinct_in_rows(np.concatenate(touched, axis=1)).sum(axis=1)
    different = distinct_in_rows(addresses).sum(axis=1)
    return int(distinct.sum()), int((-(-different * size // SECTOR)).sum())


def wavefronts(addresses: np.ndarray, size: int, active: np.ndarray) -> tuple[int, int]:
    """Passes of a shared access, and the fewest that its words fit in.

    Args:
        addresses: int64 (warps, 32), multiples of `size`. size: bytes a lane, 1 to 16. active: bool (warps, 32).

    Returns:
        Both summed over warps: (taken, least possible).
    """
    words = max(1, size // WORD)
    lanes = LANES // words
    inside = active.reshape(-1, lanes)
    first = addresses.reshape(-1, lanes) // WORD
    # (phases, lanes, words) -> (phases, 32)
    wanted = first[:, :, None] + np.arange(words)
    wanted = np.where(inside[:, :, None], wanted, _NOWHERE).reshape(len(first), -1)
    ordered = np.sort(wanted, axis=1)
    distinct = _first_of_each(ordered)
    phase = np.broadcast_to(np.arange(len(ordered))[:, None], ordered.shape)
    slot = phase[distinct] * BANKS + ordered[distinct] % BANKS
    taken = np.bincount(slot, minlength=len(ordered) * BANKS).reshape(-1, BANKS).max(axis=1)
    least = -(-distinct.sum(axis=1) // BANKS)
    return int(taken.sum()), int(least.sum())


def distinct_in_rows(values: np.ndarray) -> np.ndarray:
    """For (rows, n) values, -1 meaning none: bool (rows, n) with one True for each distinct value of a row."""
    return _first_of_each(np.sort(values, axis=1))


def _first_of_each(ordered: np.ndarray) -> np.ndarray:
    found = ordered != _NOWHERE
    found[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return found

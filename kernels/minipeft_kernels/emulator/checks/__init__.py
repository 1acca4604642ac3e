"""Observers that find what a GPU would let pass: each raises one kind of error.

Accesses out of bounds and misaligned, barriers that not all threads reach, and deadlocks the machine finds by itself.
"""

from ..observer import Observer
from .async_copies import AsyncCopies
from .races import Races
from .uninitialized import Uninitialized

__all__ = ["AsyncCopies", "Races", "Uninitialized", "all_checks"]


def all_checks() -> list[Observer]:
    """One of each, as they are by default."""
    return [Uninitialized(), AsyncCopies(), Races()]

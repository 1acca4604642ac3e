"""Observers that find what a GPU would let pass: each raises one kind of error.

Accesses out of bounds and misaligned, barriers that not all threads reach, and deadlocks the machine finds by itself.
"""

from .async_copies import AsyncCopies
from .races import Races
from .uninitialized import Uninitialized

__all__ = ["AsyncCopies", "Races", "Uninitialized"]

"""The compiled part for CPUs: found, checked and loaded. `kernels/native` has its sources in C, which setup.py builds.

It is optional: a machine without a C compiler installs minipeft without it, and `dispatch` takes the PyTorch references
instead. It knows nothing of Python (no Python.h), and shares OpenMP's threads with torch, which is imported first.
"""

import ctypes
import functools
import importlib.util
import os
import struct

import torch

# The layout of the calls, as in kernels/native/entry.c: raised together, so that a library built from older sources is
# noticed and not called.
ABI = 2

SCALAR, AVX2, AVX512, AVX512_BF16 = range(4)
LEVELS = ("scalar", "AVX2", "AVX-512", "AVX-512 with bfloat16")

MODULE = "minipeft_kernels._native"
REINSTALL = "reinstall minipeft where there is a C compiler (in a checkout: pip install -e .)"

# A dtype's number in a call.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def obstacle() -> str:
    """Why the compiled part cannot be used, or "" if it can; what to do about it included."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else ""


def library() -> ctypes.CDLL:
    """The loaded library; there must be no `obstacle`."""
    loaded = _load()
    assert not isinstance(loaded, str), loaded
    return loaded


@functools.cache
def level() -> int:
    """The best instructions that this processor has and the library uses: SCALAR, AVX2, AVX512 or AVX512_BF16."""
    found: int = library().minipeft_level()
    return found


def describe() -> str:
    """The compiled part in words, for reports: "native (AVX-512)", or why it is not there."""
    return obstacle() or f"native ({LEVELS[level()]})"


@functools.cache
def packer(count: int) -> struct.Struct:
    """Packs `count` 64-bit integers, which is how a call passes its arguments."""
    return struct.Struct(f"{count}q")


def threads() -> int:
    """Threads for a call: torch's; in a forked process one, because OpenMP's other threads stayed with the parent."""
    return 1 if _forked else torch.get_num_threads()


@functools.cache
def _load() -> ctypes.CDLL | str:
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return f"minipeft's compiled part is not there: {REINSTALL}"
    try:
        found = ctypes.CDLL(spec.origin)
        abi = found.minipeft_abi()
    except (OSError, AttributeError) as error:
        return f"minipeft's compiled part cannot be loaded ({error}): {REINSTALL}"
    if abi != ABI:
        return f"minipeft's compiled part was built from other sources (version {abi}, not {ABI}): {REINSTALL}"
    for name in ("minipeft_decode", "minipeft_product", "minipeft_thin"):
        getattr(found, name).argtypes = [ctypes.c_char_p]
    return found


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

"""The compiled part for CPUs: found, checked and loaded. `kernels/native` has its sources in C, which setup.py builds.

It is optional: a machine without a C compiler installs minipeft without it, and `dispatch` takes the PyTorch references
instead. It knows nothing of Python (no Python.h), and shares OpenMP's threads with torch, which is imported first.

MINIPEFT_CPU=scalar, avx2, avx512, avx512_bf16 or neon makes minipeft treat the processor as one of that level, to test
what a lesser one would do: it chooses the compiled code, and `arithmetic` obeys it too. It is read once.
"""

import ctypes
import functools
import importlib.util
import os
import struct

import torch

# The layout of the calls, as in kernels/native/entry.c: raised together, so that a library built from older sources is
# noticed and not called.
ABI = 6

SCALAR, AVX2, AVX512, AVX512_BF16, NEON = range(5)
LEVELS = ("scalar", "AVX2", "AVX-512", "AVX-512 with bfloat16", "NEON")
LEVEL_VARIABLE = "MINIPEFT_CPU"
LEVEL_NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "neon")

MODULE = "minipeft_kernels._native"
REINSTALL = "reinstall minipeft where there is a C compiler (in a checkout: pip install -e .)"

# A dtype's number in a call.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def obstacle() -> str:
    """The reason why the compiled part cannot be used, and what to do about it; "" if it can be used."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else ""


def library() -> ctypes.CDLL:
    """The loaded library; there must be no `obstacle`."""
    loaded = _load()
    assert not isinstance(loaded, str), loaded
    return loaded


@functools.cache
def level_limit() -> int:
    """The level that MINIPEFT_CPU names, or the highest one where the variable is unset or empty.

    Raises:
        ValueError: MINIPEFT_CPU is not the name of a level.
    """
    name = os.environ.get(LEVEL_VARIABLE, "")
    if name not in ("", *LEVEL_NAMES):
        raise ValueError(f"{LEVEL_VARIABLE} must be one of {', '.join(LEVEL_NAMES)}, or unset, got {name!r}")
    return LEVEL_NAMES.index(name) if name else AVX512_BF16


@functools.cache
def level() -> int:
    """The instructions that the library uses: the best that this processor has, or those that MINIPEFT_CPU names.

    Returns:
        SCALAR, AVX2, AVX512, AVX512_BF16 or NEON.

    Raises:
        ValueError: MINIPEFT_CPU names a level that this processor lacks, or none.
    """
    if not os.environ.get(LEVEL_VARIABLE):
        return levels()[-1]
    if level_limit() not in levels():
        choices = ", ".join(LEVEL_NAMES[i] for i in levels())
        name = LEVEL_NAMES[level_limit()]
        raise ValueError(
            f"{LEVEL_VARIABLE}={name}, but this processor has no {LEVELS[level_limit()]}: it has {choices}"
        )
    return level_limit()


def levels() -> list[int]:
    """The levels that this processor has the instructions for, the best one last."""
    best: int = library().minipeft_level()
    return [SCALAR, NEON] if best == NEON else list(range(best + 1))


def has_products() -> bool:
    """True if the library multiplies at this level; it decodes at every one."""
    return level() != SCALAR


def describe() -> str:
    """The compiled part in words, for reports: "native (AVX-512)", or why it is not there."""
    if obstacle():
        return obstacle()
    alone = "" if library().minipeft_openmp() else ", one thread: its compiler had no OpenMP"
    return f"native ({LEVELS[level()]}{alone})"


@functools.cache
def packer(count: int) -> struct.Struct:
    """A packer of `count` 64-bit integers: a call passes its arguments as one such array."""
    return struct.Struct(f"{count}q")


def threads() -> int:
    """The number of threads for a call: torch's, but 1 in a forked process: OpenMP's threads stayed in the parent."""
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
    for name in ("minipeft_decode", "minipeft_product", "minipeft_thin", "minipeft_dense"):
        getattr(found, name).argtypes = [ctypes.c_char_p]
    return found


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)

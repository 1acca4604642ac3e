"""Helpers of the compiled CPU code's tests: weights in any state, their reference, levels, counted calls."""

import pytest
import torch
from torch import Tensor

from minipeft.nf4 import NF4Weight
from minipeft_kernels import arithmetic, native
from minipeft_kernels.nf4.codebooks import NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.dequantize import nf4_dequantize_reference

needs_library = pytest.mark.skipif(bool(native.obstacle()), reason=native.obstacle())
# The levels of compiled code that this processor has the instructions for.
LEVELS = [native.SCALAR] if native.obstacle() else native.levels()


def become(level: int, patch: pytest.MonkeyPatch) -> None:
    """Compute as on a processor of this level: all that MINIPEFT_CPU decides."""
    patch.setattr(native, "level", lambda: level)
    patch.setattr(arithmetic, "HAS_ONEDNN", arithmetic.HAS_ONEDNN and level >= native.AVX512)
    dtypes = arithmetic.CPU_DTYPES if level == native.AVX512_BF16 else frozenset({torch.float32})
    patch.setattr(arithmetic, "CPU_DTYPES", dtypes)


def random_state(n: int, blocksize: int, double: bool, exponents: tuple[float, float] = (-3, 3)) -> NF4Weight:
    """Any codes and scales: n weights whose scales have exponents from a range, which quantizing may not give."""
    blocks = -(-n // blocksize)
    scales = torch.exp2(torch.empty(blocks).uniform_(*exponents))
    codes = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8)
    w = NF4Weight(codes, scales, NF4_LEVELS.clone(), blocksize, torch.Size((n,)), torch.float32)
    if double:
        w.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        w.nested_absmax = torch.rand(-(-blocks // 256)) * 2.0 ** exponents[1]
        w.nested_quant_map, w.offset = dynamic_map().clone(), torch.tensor(2.0 ** exponents[0])
    return w


def by_reference(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    return nf4_dequantize_reference(w.packed(), dtype).view(w.shape)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the compiled functions, as they are called from here on."""
    calls: list[str] = []

    class Counted:
        def __getattr__(self, name: str) -> object:
            calls.append(name)
            return getattr(real, name)

    real = native.library()
    monkeypatch.setattr(native, "library", Counted)
    return calls

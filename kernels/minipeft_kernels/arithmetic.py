"""Which dtype a matrix product is computed in: the one place that looks at what the CPU can do.

A CPU without instructions for bfloat16 or float16 products emulates them: `grad @ W` in bfloat16 ran 600 times
slower than in float32 on such a machine (50 s against 0.08 s at 4096x4096, M = 256). There the arithmetic is
float32, whatever was asked for.
"""

import logging

import torch
from torch import Tensor

from . import native

logger = logging.getLogger("minipeft")


def _native_cpu_dtypes() -> frozenset[torch.dtype]:
    dtypes = {torch.float32}
    if native.level_limit() < native.AVX512_BF16:
        return frozenset(dtypes)
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        dtypes.add(torch.bfloat16)
    if torch.cpu._is_amx_fp16_supported():
        dtypes.add(torch.float16)
    return frozenset(dtypes)


CPU_DTYPES = _native_cpu_dtypes()
"""The dtypes that this CPU has matrix instructions for."""

_said: set[torch.dtype] = set()


def arithmetic_dtype(asked: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply in on `device` when `asked` is wanted: `asked`, or float32 where that is emulated."""
    if asked in CPU_DTYPES or device.type != "cpu" or asked.itemsize > 2:
        return asked
    # torch.compile cannot trace a logger.
    if asked not in _said and not torch.compiler.is_compiling():
        _said.add(asked)
        logger.warning("this CPU has no %s matrix instructions: products are in float32 instead", asked)
    return torch.float32


def as_autocast(x: Tensor) -> Tensor:
    """x as a product takes it: in autocast's dtype under autocast, as `F.linear` would have it.

    float64, and what is no floating point, are left alone.
    """
    if not torch._C._is_any_autocast_enabled():
        return x
    kind, eligible = x.device.type, x.dtype.is_floating_point and x.dtype != torch.float64
    if eligible and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x

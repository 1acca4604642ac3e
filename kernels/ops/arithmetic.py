"""Which dtype a matrix product is computed in: the one place that looks at what the CPU can do.

A CPU without instructions for bfloat16 or float16 products emulates them: `grad @ W` in bfloat16 ran 600 times
slower than in float32 on such a machine (50 s against 0.08 s at 4096x4096, M = 256). There the arithmetic is
float32, whatever was asked for.
"""

import functools
import logging

import torch

logger = logging.getLogger("minipeft")


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrix products in `dtype`."""
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    return False


def arithmetic_dtype(asked: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply in on `device` when `asked` is wanted: `asked`, or float32 where that is emulated."""
    if device.type != "cpu" or cpu_multiplies(asked):
        return asked
    _say_once(asked)
    return torch.float32


@functools.cache
def _say_once(asked: torch.dtype) -> None:
    logger.warning(
        "this CPU has no %s matrix instructions: NF4 products are computed in float32 instead", asked
    )

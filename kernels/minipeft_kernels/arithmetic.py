"""The dtype of a matrix product, and the library that computes it: the one place that looks at what the CPU can do.

A CPU without instructions for bfloat16 or float16 products emulates them: `grad @ W` in bfloat16 ran 600 times
slower than in float32 on such a machine (50 s against 0.08 s at 4096x4096, M = 256). There the arithmetic is
float32, whatever was asked for.
"""

import functools
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

# Multiply-adds from which oneDNN is taken. A call costs 12 microseconds, one of MKL's 2: at (64, 576) x (16, 576) both
# take 16, at (128, 576) x (16, 576) 22 and 28, at (1024, 576) x (16, 576) 98 and 219.
LEAST = 1 << 20


def _find_onednn() -> bool:
    """True if oneDNN is there and has wider instructions than MKL may have."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and native.level_limit() >= native.AVX512
    return wide and torch.backends.mkldnn.is_available()


HAS_ONEDNN = _find_onednn()

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


def dense_product(a: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """scale a W^T by the faster of the two libraries that PyTorch brings for CPUs. It records no gradient.

    In float32 `torch.mm` goes to MKL, which runs AVX2 code on every processor that is not Intel's. oneDNN, which is in
    the same build and multiplies PyTorch's 16-bit matrices, takes the widest instructions there are. On an AMD EPYC
    with AVX-512 (Zen 5), one thread: MKL 100 GFLOP/s in every shape, oneDNN 200 to 240.

    Args:
        a: (M, K). w: (N, K), of the same dtype. Either may be a transposed view; where one of M and N is small, it is
            faster as M.

    Returns:
        (M, N) in their dtype.
    """
    if HAS_ONEDNN and a.dtype == torch.float32 and a.numel() * w.shape[0] >= LEAST and a.is_cpu:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")
        return y if scale == 1.0 else y.mul_(scale)
    if scale == 1.0:
        return torch.mm(a, w.T)
    # By the product's own factor: a call less, which on a GPU is a launch, too. What is added is not read.
    return torch.addmm(_nothing(a.dtype, a.device), a, w.T, beta=0, alpha=scale)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((), dtype=dtype, device=device)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`: x itself where it is in it, without asking torch, which takes a microsecond to find that out."""
    return x if x.dtype == dtype else x.to(dtype)

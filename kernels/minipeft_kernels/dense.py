"""a W^T of dense matrices, without a gradient, by the faster of the two libraries that PyTorch brings for CPUs.

In float32 `torch.mm` goes to MKL, which runs AVX2 code on every processor that is not Intel's. oneDNN, which is in the
same build and multiplies PyTorch's 16-bit matrices, takes the widest instructions there are. On an AMD EPYC with
AVX-512 (Zen 5), one thread: MKL 100 GFLOP/s in every shape, oneDNN 200 to 240.
"""

import torch
from torch import Tensor

from . import native

# Multiply-adds from which oneDNN is taken. A call costs 12 microseconds, one of MKL's 2: at (64, 576) x (16, 576) both
# take 16, at (128, 576) x (16, 576) 22 and 28, at (1024, 576) x (16, 576) 98 and 219.
LEAST = 1 << 20


def _find_onednn() -> bool:
    """True if oneDNN is there and has wider instructions than MKL may have."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and native.level_limit() >= native.AVX512
    return wide and torch.backends.mkldnn.is_available()


HAS_ONEDNN = _find_onednn()


def product(a: Tensor, w: Tensor) -> Tensor:
    """a W^T: (M, K) and (N, K) -> (M, N), in their dtype. Not differentiable: for what has its own backward.

    Either may be a transposed view. Where one of the results' sizes is small, it is faster as M (of `a`).
    """
    if HAS_ONEDNN and a.dtype == torch.float32 and a.numel() * w.shape[0] >= LEAST and a.is_cpu:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")
        return y
    return a @ w.T

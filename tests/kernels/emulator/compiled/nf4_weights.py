"""A packed weight for the proofs, with the dense one that it stands for."""

import torch

from minipeft_kernels.nf4.codebooks import NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4.dequantize import nf4_dequantize_reference
from minipeft_kernels.nf4.quantize import nf4_quantize_reference, quantize_absmax_reference
from minipeft_kernels.packed import NF4


class Weight:
    """A random (n, k) weight: packed, and the dense float64 matrix, all by the references."""

    def __init__(self, n: int, k: int, blocksize: int = 64, double: bool = True) -> None:
        codes, absmax = nf4_quantize_reference(torch.randn(n, k) / max(n, k) ** 0.5, blocksize)
        self.packed = NF4(codes, absmax, NF4_LEVELS.clone(), None, None, None, n, k, blocksize)
        if double:
            offset = absmax.mean()
            stored, nested = quantize_absmax_reference(absmax, offset)
            self.packed = NF4(codes, stored, NF4_LEVELS.clone(), nested, dynamic_map().clone(), offset, n, k, blocksize)
        self.dense = nf4_dequantize_reference(self.packed, torch.float64)

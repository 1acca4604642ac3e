"""A packed weight for the proofs, with the dense one that it stands for."""

import torch
from torch import Tensor

from minipeft_kernels.codebooks import NF4_LEVELS, dynamic_map
from minipeft_kernels.nf4_dequantize import dequantize_absmax, nf4_dequantize_reference
from minipeft_kernels.nf4_quantize import nf4_quantize_reference, quantize_absmax_reference


class Weight:
    """A random (n, k) weight: the tensors that launchers take, and the dense float64 matrix, all by the references."""

    def __init__(self, n: int, k: int, blocksize: int = 64, double: bool = True) -> None:
        codes, absmax = nf4_quantize_reference(torch.randn(n, k) / max(n, k) ** 0.5, blocksize)
        self.tensors: list[Tensor | None] = [codes, absmax, NF4_LEVELS.clone(), None, None, None]
        scales = absmax
        if double:
            offset = absmax.mean()
            stored, nested = quantize_absmax_reference(absmax, offset)
            scales = dequantize_absmax(stored, nested, dynamic_map(), offset)
            self.tensors[1:] = [stored, NF4_LEVELS.clone(), nested, dynamic_map().clone(), offset]
        self.sizes = (n, k, blocksize)
        self.scales = scales
        self.dense = nf4_dequantize_reference(codes, scales, NF4_LEVELS, n * k, blocksize, torch.float64).view(n, k)

"""The operations on packed weights, in PyTorch; imported as `minipeft.kernels`."""

from .nf4_dequantize import nf4_dequantize
from .nf4_matmul import nf4_matmul
from .nf4_quantize import nf4_quantize

__all__ = ["nf4_dequantize", "nf4_matmul", "nf4_quantize"]

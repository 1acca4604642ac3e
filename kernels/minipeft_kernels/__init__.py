"""The operations on packed weights and optimizer state; imported as `minipeft.kernels`.

Each is `torch.ops.minipeft.<name>`: PyTorch on a CPU, a Triton kernel on a GPU (`dispatch` decides).
"""

from .adamw import adamw_, adamw_8bit_
from .lora_linear import frozen_linear, lora_linear
from .lora_matmul import lora_matmul, lora_update
from .nf4_dequantize import nf4_dequantize
from .nf4_matmul import nf4_matmul
from .nf4_quantize import nf4_quantize, quantize_absmax

__all__ = [
    "adamw_",
    "adamw_8bit_",
    "frozen_linear",
    "lora_linear",
    "lora_matmul",
    "lora_update",
    "nf4_dequantize",
    "nf4_matmul",
    "nf4_quantize",
    "quantize_absmax",
]

"""The operations on packed weights and optimizer state: the public names of `minipeft_kernels`, in `kernels/`.

Each is `torch.ops.minipeft.<name>`: PyTorch or compiled C on a CPU, a Triton kernel on a GPU.
"""

from minipeft_kernels import (
    adamw_,
    adamw_8bit_,
    frozen_linear,
    lora_linear,
    lora_matmul,
    lora_update,
    nf4_dequantize,
    nf4_matmul,
    nf4_quantize,
    quantize_absmax,
)

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

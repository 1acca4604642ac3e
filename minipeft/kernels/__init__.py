"""The operations on packed weights and optimizer state: the public names of `minipeft_kernels`, in `kernels/`.

Each is, or calls, an operation of `torch.ops.minipeft`: PyTorch or compiled C on a CPU, a Triton kernel on a GPU.
`linear` is the one product with a frozen weight, a tensor or `NF4`; `frozen_linear`, `lora_linear`, `nf4_matmul`,
`lora_matmul` and `lora_update` are its cases by name. `experts_linear` is the same product for a mixture's
experts, whose matrices are one tensor or one `NF4Stack`.
"""

from minipeft_kernels.adamw.op import adamw_, adamw_8bit_
from minipeft_kernels.experts.op import experts_linear
from minipeft_kernels.experts.stack import NF4Stack
from minipeft_kernels.linear.op import linear
from minipeft_kernels.linear.shorthands import frozen_linear, lora_linear, lora_matmul, lora_update, nf4_matmul
from minipeft_kernels.nf4.dequantize import nf4_dequantize
from minipeft_kernels.nf4.quantize import nf4_quantize, quantize_absmax
from minipeft_kernels.packed import NF4

__all__ = [
    "NF4",
    "NF4Stack",
    "adamw_",
    "adamw_8bit_",
    "experts_linear",
    "frozen_linear",
    "linear",
    "lora_linear",
    "lora_matmul",
    "lora_update",
    "nf4_dequantize",
    "nf4_matmul",
    "nf4_quantize",
    "quantize_absmax",
]

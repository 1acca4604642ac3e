"""Experts' matrices in NF4, made one by one: what a stack has to be, whoever makes it."""

import torch
from torch import Tensor

from minipeft.nf4 import NF4Weight
from minipeft_kernels.experts.stack import NF4Stack


def stack_of(w: Tensor, double_quant: bool = True, blocksize: int = 64) -> NF4Stack:
    """(experts, out_features, in_features) -> each expert's matrix quantized by itself."""
    each = [NF4Weight.quantize(matrix.contiguous(), blocksize, double_quant).packed() for matrix in w]
    first = each[0]

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in each])

    return NF4Stack(
        torch.stack([one.codes.reshape(-1) for one in each]),
        stacked("absmax"),
        first.quant_map,
        stacked("nested_absmax") if double_quant else None,
        first.nested_map,
        stacked("offset") if double_quant else None,
        first.rows,
        first.columns,
        first.blocksize,
        first.nested_blocksize,
    )

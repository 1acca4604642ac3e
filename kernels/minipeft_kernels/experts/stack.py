"""The 4-bit matrices of all experts of a layer, named, and how an operation of torch's takes them: see `packed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nf4.checks import check_for_kernel, needed_of
from ..packed import NF4


class NF4Stack(NamedTuple):
    """The matrices of a layer's experts, `rows` x `columns` each, in 4-bit NormalFloat, every one by itself.

    The fields are those of `NF4`, and the per-expert ones have a first dimension more: no block, no nested scale and no
    offset belongs to two experts, so `expert(e)` is the NF4 of that expert's matrix alone.

    Attributes:
        codes: uint8 (experts, (n+1)//2), n = rows * columns.
        absmax: (experts, blocks), float32 or, doubly quantized, uint8.
        quant_map: float32 (16,).
        nested_absmax: float32 (experts, ceil(blocks / nested_blocksize)), or None.
        nested_map: float32 (256,), or None.
        offset: float32 (experts,), or None.
        rows, columns: out_features and in_features of one expert.
        blocksize, nested_blocksize: as in `NF4`.
    """

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None
    rows: int
    columns: int
    blocksize: int
    nested_blocksize: int = 256

    @property
    def experts(self) -> int:
        """The number of matrices."""
        return self.codes.shape[0]

    def expert(self, e: int) -> NF4:
        """The matrix of expert e, sharing its memory."""
        codes, absmax, quant_map, nested_absmax, nested_map, offset, *sizes = self
        return NF4(
            codes[e].unsqueeze(1),  # (bytes,) -> (bytes, 1)
            absmax[e],
            quant_map,
            None if nested_absmax is None else nested_absmax[e],
            nested_map,
            None if offset is None else offset[e],
            *sizes,
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors, in the order of the fields."""
        return self.codes, self.absmax, self.quant_map, self.nested_absmax, self.nested_map, self.offset


Stack = Tensor | NF4Stack
"""The frozen matrices of experts, (experts, out_features, in_features): dense, perhaps a transposed view, or NF4."""


def flatten_stack(weight: Stack | None) -> Sequence[Any]:
    """`weight` as arguments of `packed.SCHEMA`: the ten fields of an NF4Stack, or the dense tensor alone."""
    return weight if isinstance(weight, NF4Stack) else (weight,)


def unflatten_stack(arguments: Sequence[Any]) -> Stack | None:
    """The experts' weights that came as arguments of SCHEMA, as `unflatten`."""
    weight: Any
    weight, *rest = arguments or (None,)
    return NF4Stack(weight, *rest) if rest and rest[0] is not None else weight


def check_stack_for_kernel(stack: NF4Stack, offsets: Tensor | None, up: Tensor | None, device: torch.device) -> None:
    """Raise ValueError unless the kernels can read a stack, offsets and an update's factors by the stack's sizes.

    Args:
        offsets: int32 (experts,). up: (experts, any, any), or None. Both, and the stack, on `device`.
    """
    experts = stack.experts
    if not experts:
        raise ValueError("a stack for the Triton kernels must have an expert at least")
    check_for_kernel(stack.expert(0), device)
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        tensor = getattr(stack, name)
        count = 1 if name == "offset" else needed_of(stack.expert(0))[0][NF4._fields.index(name)]
        if tensor is not None and tensor.numel() != experts * count:
            raise ValueError(f"{name} of {experts} experts must be {experts} x {count}, got {tuple(tensor.shape)}")
    if offsets is None or offsets.shape != (experts,) or offsets.dtype != torch.int32 or offsets.device != device:
        got = "None" if offsets is None else f"{tuple(offsets.shape)} of {offsets.dtype} on {offsets.device}"
        raise ValueError(f"offsets must be int32 ({experts},) on {device}, got {got}")
    if up is not None and (up.dim() != 3 or up.shape[0] != experts):
        raise ValueError(
            f"the update's factors must be one matrix for each of {experts} experts, got {tuple(up.shape)}"
        )

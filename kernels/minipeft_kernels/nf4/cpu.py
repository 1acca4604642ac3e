"""Decoding NF4 weights in compiled code for CPUs: `kernels/native` has it, kernels/README.md says how."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..packed import NF4
from .checks import misfit, needed_of


def decode_range(out: Tensor, weight: NF4, first: int, last: int) -> Tensor:
    """Decode weights first..last-1 of the row-major order into `out`, and return it.

    Args:
        out: contiguous, last - first elements, float32, bfloat16 or float16; overwritten.
        weight: on the CPU.

    Raises:
        ValueError: a tensor of `weight` is too small for its sizes, or of another dtype or device; or a block is empty.
    """
    assert out.is_contiguous() and out.numel() == last - first
    level = native.SCALAR if weight.blocksize % 32 else native.level()
    tensors, numbers = as_numbers(weight)
    call = (first, last, out.data_ptr(), native.DTYPES[out.dtype], level, native.threads())
    native.library().minipeft_decode(native.packer(16).pack(*numbers, *call))
    del tensors  # not before: they may be copies
    return out


def as_numbers(weight: NF4) -> tuple[list[Tensor], list[int]]:
    """The first ten arguments of a compiled function: the addresses of the weight's tensors, and its four sizes.

    Returns:
        The tensors at those addresses, contiguous and checked to hold all that will be read of them, which must be
        kept until the call is over; and the numbers.

    Raises:
        ValueError: as `decode_range`.
    """
    *tensors, rows, columns, blocksize, nested_blocksize = weight
    counts, dtypes = needed_of(weight)
    kept: list[Tensor] = []
    numbers: list[int] = []
    # This runs at every token and layer: a look more at each of six tensors is a microsecond.
    for tensor, count, dtype in zip(tensors, counts, dtypes):  # noqa: B905, the shortest decides
        if tensor is None or tensor.dtype is not dtype or tensor.numel() < count or not tensor.is_cpu:
            raise misfit(NF4._fields[len(kept)], tensor, count, dtype, torch.device("cpu"))
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        kept.append(tensor)
        numbers.append(tensor.data_ptr())
    if 0 in numbers:  # of a tensor without elements, too
        for name, address, count in zip(NF4._fields, numbers, counts):  # noqa: B905, the shortest decides
            if not address and count:
                raise ValueError(f"{name} of the NF4 weight has no memory: its storage was freed")
    if weight.nested_absmax is None:
        numbers += (0, 0, 0)
    numbers += (rows, columns, blocksize, nested_blocksize)
    return kept, numbers

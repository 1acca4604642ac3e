"""Decoding and products of NF4 weights in compiled code for CPUs; `kernels/native` has it, kernels/README.md says how.

The products want AVX-512 and rows of W that are whole blocks. What does not fit is answered with None, and multiplied
by torch after decoding, which is compiled for every processor and every size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native

# codes, absmax, quant_map, nested_absmax, nested_map, offset
Packed = Sequence[Tensor | None]


def decode_into(out: Tensor, packed: Packed, sizes: Sequence[int], first: int, last: int) -> Tensor:
    """Decode weights first..last-1 of W's row-major order into `out`, and return it.

    Args:
        out: contiguous, last - first elements, float32, bfloat16 or float16; overwritten.
        packed: as `nf4_matmul` takes them.
        sizes: rows, columns, blocksize, nested_blocksize; of rows and columns the product alone matters.

    Raises:
        ValueError: a tensor of `packed` is too small for the sizes, or of another dtype or device.
    """
    assert out.is_contiguous() and out.numel() == last - first
    level = native.SCALAR if sizes[2] % 32 else native.level()
    tensors, addresses = _addresses(packed, sizes)
    call = (first, last, out.data_ptr(), native.DTYPES[out.dtype], level, native.threads())
    native.library().minipeft_decode(native.packer(16).pack(*addresses, *sizes, *call))
    del tensors  # not before: they may be copies
    return out


def product(
    a: Tensor, packed: Packed, sizes: Sequence[int], dtype: torch.dtype, backward: bool = False
) -> Tensor | None:
    """a W^T, or backward a W, or None where the compiled code has no such product.

    Args:
        a: (M, K) or backward (M, N), float32 or bfloat16, which is also the arithmetic; sums are float32 in both.
        packed, sizes: as `decode_into`; sizes are N, K, blocksize, nested_blocksize.
        dtype: of the result, float32 or bfloat16; rounded to it once.

    Returns:
        (M, N) or backward (M, K).

    Raises:
        ValueError: as `decode_into`.
    """
    if not _fits(a.dtype, sizes, dtype, backward):
        return None
    m = a.shape[0]
    out = torch.empty(m, sizes[1] if backward else sizes[0], dtype=dtype)
    if m == 0:
        return out
    a = a.contiguous()
    tensors, addresses = _addresses(packed, sizes)
    kinds = (int(backward), native.DTYPES[a.dtype], native.DTYPES[dtype])
    call = (a.data_ptr(), out.data_ptr(), m, *kinds, native.threads())
    native.library().minipeft_product(native.packer(17).pack(*addresses, *sizes, *call))
    del tensors
    return out


def _fits(a: torch.dtype, sizes: Sequence[int], dtype: torch.dtype, backward: bool) -> bool:
    n, k, blocksize, _ = sizes
    # Blocks are powers of two wherever they come from a checked weight.
    if n == 0 or k == 0 or k % blocksize or blocksize < 32 or blocksize & (blocksize - 1) or dtype == torch.float16:
        return False
    if a == torch.bfloat16:
        # Its instruction adds two terms at a time, backward two rows of W.
        return native.level() == native.AVX512_BF16 and not (backward and n % 2)
    return a == torch.float32 and native.level() >= native.AVX512


def _addresses(packed: Packed, sizes: Sequence[int]) -> tuple[list[Tensor | None], list[int]]:
    """Contiguous tensors and where they are, checked to hold all that will be read of them."""
    rows, columns, blocksize, nested_blocksize = sizes
    blocks = -(-rows * columns // blocksize)
    double = packed[3] is not None
    counts = ((rows * columns + 1) // 2, blocks, 16, -(-blocks // nested_blocksize), 256, 1)
    tensors: list[Tensor | None] = []
    for i, (tensor, count) in enumerate(zip(packed, counts, strict=True)):
        if i > 2 and not double:
            tensors.append(None)
            continue
        dtype = torch.uint8 if i == 0 or (i == 1 and double) else torch.float32
        if tensor is None or tensor.dtype != dtype or tensor.numel() < count or not tensor.is_cpu:
            raise ValueError(
                f"{_NAMES[i]} must be {count} of {dtype} on the CPU for {_sizes(sizes)}, got {_got(tensor)}"
            )
        tensors.append(tensor if tensor.is_contiguous() else tensor.contiguous())
    return tensors, [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


_NAMES = ("codes", "absmax", "quant_map", "nested_absmax", "nested_map", "offset")


def _sizes(sizes: Sequence[int]) -> str:
    return "a {}x{} weight in blocks of {} (nested: {})".format(*sizes)


def _got(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"

"""Decoding and products of NF4 weights in compiled code for CPUs; `kernels/native` has it, kernels/README.md says how.

The products want AVX-512 and rows of W that are whole blocks. What does not fit is answered with None, and multiplied
by torch after decoding, which is compiled for every processor and every size.
"""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native

# As in kernels/native/nf4.h: how many rows of x are multiplied by W where it lies.
THIN_ROWS = 4
_THIN_CALL = struct.Struct("19qd")

# codes, absmax, quant_map, nested_absmax, nested_map, offset
Packed = Sequence[Tensor | None]


def decode_into(out: Tensor, packed: Packed, sizes: Sequence[int], first: int, last: int) -> Tensor:
    """Decode weights first..last-1 of W's row-major order into `out`, and return it.

    Args:
        out: contiguous, last - first elements, float32, bfloat16 or float16; overwritten.
        packed: as `nf4_matmul` takes them.
        sizes: rows, columns, blocksize, nested_blocksize; of rows and columns the product alone matters.

    Raises:
        ValueError: a tensor of `packed` is too small for the sizes, or of another dtype or device; or a block is empty.
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
        a: (..., K) or backward (..., N), float32 or bfloat16, which is also the arithmetic; sums are float32 in both.
        packed, sizes: as `decode_into`; sizes are N, K, blocksize, nested_blocksize.
        dtype: of the result, float32 or bfloat16; rounded to it once.

    Returns:
        (..., N) or backward (..., K).

    Raises:
        ValueError: as `decode_into`.
    """
    if not _fits(a.dtype, sizes, dtype, backward) or not _is_there(a):
        return None
    to, of = (sizes[1], sizes[0]) if backward else (sizes[0], sizes[1])
    if not backward and 0 < a.numel() <= THIN_ROWS * of:
        return _thin_product(a, packed, sizes, dtype, a.numel() // of)
    out = torch.empty((*a.shape[:-1], to), dtype=dtype)
    rows = a.numel() // of
    if rows == 0:
        return out
    if not a.is_contiguous():
        a = a.contiguous()
    kept, addresses = _addresses(packed, sizes)
    numbers = native.DTYPES
    call = (a.data_ptr(), out.data_ptr(), rows, backward, numbers[a.dtype], numbers[dtype], native.threads())
    native.library().minipeft_product(native.packer(17).pack(*addresses, *sizes, *call))
    del kept
    return out


def adapted_product(
    x: Tensor,
    packed: Packed,
    sizes: Sequence[int],
    dtype: torch.dtype,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor | None:
    """x W^T + s (x A^T) B^T for up to THIN_ROWS rows of x, or None where the compiled code has no such product.

    In one call: of a small layer and one row, each call of torch's takes as long as the whole.

    Args:
        x, packed, sizes, dtype: as `product`'s.
        lora_A, lora_B: (r, K) and (N, r), float32, in which the update is computed and added before rounding.
        scaling: s.

    Returns:
        (..., N).

    Raises:
        ValueError: as `decode_into`.
    """
    rows = x.numel() // sizes[1] if sizes[1] else 0
    if not 0 < rows <= THIN_ROWS or not _fits(x.dtype, sizes, dtype, backward=False) or not _is_there(x):
        return None
    rank = lora_A.shape[0]
    if not _is_matrix(lora_A, (rank, sizes[1])) or not _is_matrix(lora_B, (sizes[0], rank)):
        return None
    return _thin_product(x, packed, sizes, dtype, rows, (lora_A.data_ptr(), lora_B.data_ptr(), rank), scaling)


def _is_matrix(t: Tensor, shape: tuple[int, int]) -> bool:
    return t.dtype == torch.float32 and t.shape == shape and t.is_cpu and t.is_contiguous() and _is_there(t)


def _is_there(t: Tensor) -> bool:
    """Whether a tensor has memory: a sharded model's storages are freed while they are not needed."""
    return t.data_ptr() != 0 or t.numel() == 0


def _thin_product(
    x: Tensor,
    packed: Packed,
    sizes: Sequence[int],
    dtype: torch.dtype,
    rows: int,
    update: tuple[int, int, int] = (0, 0, 0),
    scaling: float = 0.0,
) -> Tensor | None:
    """As `adapted_product`, of what fits; update: the addresses of A and B, and the rank."""
    x = x if x.is_contiguous() else x.contiguous()
    out = torch.empty((*x.shape[:-1], sizes[0]), dtype=dtype)
    kept, addresses = _addresses(packed, sizes)
    numbers = native.DTYPES
    call = (x.data_ptr(), out.data_ptr(), rows, numbers[x.dtype], numbers[dtype], native.threads(), *update, scaling)
    done = native.library().minipeft_thin(_THIN_CALL.pack(*addresses, *sizes, *call))
    del kept
    return out if done else None


def _fits(a: torch.dtype, sizes: Sequence[int], dtype: torch.dtype, backward: bool) -> bool:
    n, k, blocksize, _ = sizes
    # Blocks are powers of two wherever they come from a checked weight.
    if n == 0 or k == 0 or blocksize < 32 or k % blocksize or blocksize & (blocksize - 1) or dtype not in _RESULTS:
        return False
    if a == torch.bfloat16:
        # Its instruction adds two terms at a time, backward two rows of W.
        return native.level() == native.AVX512_BF16 and not (backward and n % 2)
    return a == torch.float32 and native.level() >= native.AVX512


_RESULTS = (torch.float32, torch.bfloat16)


def _addresses(packed: Packed, sizes: Sequence[int]) -> tuple[Packed, list[int]]:
    """Contiguous tensors and where they are, checked to hold all that will be read of them."""
    rows, columns, blocksize, nested_blocksize = sizes
    if blocksize < 1 or nested_blocksize < 1:
        raise ValueError(f"blocksize ({blocksize}) and nested_blocksize ({nested_blocksize}) must be at least 1")
    blocks = -(-rows * columns // blocksize)
    nested = packed[3] is not None
    counts = ((rows * columns + 1) // 2, blocks, 16, -(-blocks // nested_blocksize), 256, 1)
    dtypes = _NESTED_DTYPES if nested else _DTYPES
    kept, addresses = [], [0, 0, 0, 0, 0, 0]
    for i in range(6 if nested else 3):
        tensor = packed[i]
        if tensor is None or tensor.dtype != dtypes[i] or tensor.numel() < counts[i] or not tensor.is_cpu:
            got = "None" if tensor is None else f"{tensor.numel()} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{_NAMES[i]} of the NF4 weight must be {counts[i]} of {dtypes[i]} on the CPU, got {got}")
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        kept.append(tensor)
        addresses[i] = tensor.data_ptr()
        if not addresses[i] and counts[i]:
            raise ValueError(f"{_NAMES[i]} of the NF4 weight has no memory: its storage was freed")
    return kept, addresses


_NAMES = ("codes", "absmax", "quant_map", "nested_absmax", "nested_map", "offset")
_DTYPES = (torch.uint8, torch.float32, torch.float32)
_NESTED_DTYPES = (torch.uint8, torch.uint8, torch.float32, torch.float32, torch.float32, torch.float32)

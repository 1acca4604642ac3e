"""Products with an NF4 weight on a CPU: in compiled code where that has them, else decoded in PyTorch and multiplied.

`kernels/native` has the compiled code, kernels/README.md says how it works. It wants AVX2 or NEON, and rows of W that
are whole blocks; what does not fit is answered with None, and multiplied by torch after decoding, which is compiled for
every processor and every size. What the processor has no instructions for is computed in float32: x is converted
before, the result once after.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .. import native
from ..arithmetic import arithmetic_dtype, cast
from ..dispatch import use_native
from ..nf4.cpu import as_numbers
from ..packed import NF4, Weight
from . import dense_cpu
from .dense_cpu import THIN_ROWS, has_memory, is_matrix
from .low_rank import Lora, LowRank
from .reference import multiply_back_reference, multiply_reference

_THIN_CALL = struct.Struct("20qd")
# Dtypes of x, and those that the compiled code writes.
_TAKEN = (torch.float32, torch.bfloat16, torch.float16)
_WRITTEN = (torch.float32, torch.bfloat16)


def at_once(x: Tensor, weight: Weight, bias: Tensor | None, lora: Lora | None) -> Tensor | None:
    """x W^T + s (x A^T) B^T + b in one call of the compiled code, or None where that does not have it.

    Args:
        x: (..., K), float32, bfloat16 or float16, which is also the arithmetic where the CPU has it. weight: NF4, or
            dense in x's dtype.

    Returns:
        (..., N) in x's dtype.
    """
    dtype = x.dtype if bias is None else torch.float32  # the bias is added before the sum is rounded
    if lora is not None and torch._C._is_any_autocast_enabled():
        return None  # the compiled update is in float32, and autocast asks for another dtype
    if not isinstance(weight, NF4):
        y = dense_cpu.thin_product(x, weight, dtype, lora)
    elif lora is None:
        y = product(x, weight, dtype)
    else:
        y = adapted_product(x, weight, dtype, *lora)
    return y if y is None or bias is None else y.add_(bias).to(x.dtype)


def forward(
    rows: Tensor, weight: NF4, bias: Tensor | None, update: LowRank | None, compute_dtype: torch.dtype
) -> Tensor:
    """rows W^T + low up^T + b: (M, K) -> (M, N), computed in `compute_dtype`, or in float32 if the CPU lacks it.

    The result is in the dtype of rows, rounded once, after update and bias were added; with an update that is no part
    of the compiled product it is in the update's dtype, and not rounded yet.
    """
    dtype = rows.dtype
    rows = cast(rows, arithmetic_dtype(compute_dtype, rows.device))
    if update is not None and rows.shape[0] > THIN_ROWS and use_native(rows):
        y = product(rows, weight, dtype if bias is None else torch.float32, update=update)
        if y is not None:
            return y if bias is None else y.add_(bias).to(dtype)
    if update is None:
        if bias is None:
            return multiply(rows, weight, dtype)
        return multiply(rows, weight, torch.float32).add_(bias).to(dtype)
    low, up = update
    y = multiply(rows, weight, low.dtype)
    y.addmm_(low, up.to(low.dtype).T)
    if bias is not None:
        y += bias.to(y.dtype)
    return y


def input_gradient(rows: Tensor, weight: NF4, update: LowRank | None, compute_dtype: torch.dtype) -> Tensor:
    """rows W + low up: (M, N) -> (M, K), likewise."""
    dtype = rows.dtype
    rows = cast(rows, arithmetic_dtype(compute_dtype, rows.device))
    if update is None:
        return multiply_back(rows, weight, dtype)
    dx = product(rows, weight, dtype, backward=True, update=update) if use_native(rows) else None
    if dx is not None:
        return dx
    low, up = update
    return multiply_back(rows, weight, low.dtype).addmm_(low, up.to(low.dtype))


def multiply(rows: Tensor, weight: NF4, dtype: torch.dtype) -> Tensor:
    """rows W^T, computed in the dtype of `rows`: (M, K) -> (M, N) in `dtype`; compiled, or by the reference."""
    y = product(rows, weight, dtype) if use_native(rows) else None
    return cast(multiply_reference(rows, weight), dtype) if y is None else y


def multiply_back(rows: Tensor, weight: NF4, dtype: torch.dtype) -> Tensor:
    """rows W, likewise: (M, N) -> (M, K) in `dtype`."""
    dx = product(rows, weight, dtype, backward=True) if use_native(rows) else None
    return cast(multiply_back_reference(rows, weight), dtype) if dx is None else dx


def product(
    a: Tensor, weight: NF4, dtype: torch.dtype, backward: bool = False, update: LowRank | None = None
) -> Tensor | None:
    """a W^T + low B^T, or backward a W + low A, or None where the compiled code has no such product.

    Args:
        a: (..., K) or backward (..., N), float32, bfloat16 or float16, which is also the arithmetic where the compiled
            code has it; sums are float32.
        dtype: of the result, one of these; rounded to it once.
        update: low (M, r) and B (N, r) or backward A (r, K), for more than THIN_ROWS rows or backward; low in float32.

    Returns:
        (..., N) or backward (..., K).

    Raises:
        ValueError: a tensor of `weight` is too small for its sizes, or of another dtype or device; or a block is empty;
            or a has another last dimension.
    """
    if not _fits(a.dtype, weight, dtype) or not has_memory(a):
        return None
    to, of = (weight.columns, weight.rows) if backward else (weight.rows, weight.columns)
    if a.shape[-1] != of:
        raise ValueError(f"the last dimension of {tuple(a.shape)} must be {of}, as the NF4 weight has it")
    if update is not None and not _fits_update(update, a.shape[0], to, backward):
        return None
    if not backward and 0 < a.numel() <= THIN_ROWS * of:
        return _thin_product(a, weight, dtype, a.numel() // of)
    written = dtype if dtype in _WRITTEN else torch.float32
    out = torch.empty((*a.shape[:-1], to), dtype=written)
    rows = a.numel() // of
    if rows == 0:
        return cast(out, dtype)
    # The bfloat16 instruction adds two terms at a time: in the backward two rows of W.
    if a.dtype == torch.float16 or (a.dtype == torch.bfloat16 and (not _has_bfloat16() or (backward and of % 2))):
        a = a.float()
    if not a.is_contiguous():
        a = a.contiguous()
    kept, numbers = as_numbers(weight)
    dtypes = native.DTYPES
    call = (a.data_ptr(), out.data_ptr(), rows, backward, dtypes[a.dtype], dtypes[written])
    low, up = (t.float().contiguous() for t in update) if update else (None, None)
    more = (low.data_ptr(), up.data_ptr(), low.shape[1]) if low is not None and up is not None else (0, 0, 0)
    how = (native.threads(), native.level())
    native.library().minipeft_product(native.packer(21).pack(*numbers, *call, *how, *more))
    del kept, low, up
    return cast(out, dtype)


def adapted_product(
    x: Tensor, weight: NF4, dtype: torch.dtype, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor | None:
    """x W^T + s (x A^T) B^T for up to THIN_ROWS rows of x, or None where the compiled code has no such product.

    In one call: of a small layer and one row, each call of torch's takes as long as the whole.

    Args:
        x, dtype: as `product`'s.
        lora_A, lora_B: (r, K) and (N, r), float32, in which the update is computed and added before rounding.
        scaling: s.

    Returns:
        (..., N).

    Raises:
        ValueError: as `product`.
    """
    n, k = weight.rows, weight.columns
    rows = x.numel() // k if k else 0
    if not 0 < rows <= THIN_ROWS or not _fits(x.dtype, weight, dtype) or not has_memory(x):
        return None
    rank = lora_A.shape[0]
    if not is_matrix(lora_A, (rank, k)) or not is_matrix(lora_B, (n, rank)):
        return None
    return _thin_product(x, weight, dtype, rows, (lora_A.data_ptr(), lora_B.data_ptr(), rank), scaling)


def _thin_product(
    x: Tensor,
    weight: NF4,
    dtype: torch.dtype,
    rows: int,
    update: tuple[int, int, int] = (0, 0, 0),
    scaling: float = 0.0,
) -> Tensor | None:
    """`adapted_product` of arguments that fit; update: the addresses of A and B, and the rank."""
    if x.dtype == torch.float16:
        x = x.float()
    x = x if x.is_contiguous() else x.contiguous()
    written = dtype if dtype in _WRITTEN else torch.float32
    out = torch.empty((*x.shape[:-1], weight.rows), dtype=written)
    kept, numbers = as_numbers(weight)
    call = (x.data_ptr(), out.data_ptr(), rows, native.DTYPES[x.dtype], native.DTYPES[written], *update, scaling)
    done = native.library().minipeft_thin(_THIN_CALL.pack(*numbers, native.threads(), native.level(), *call))
    del kept
    return cast(out, dtype) if done else None


def _fits(a: torch.dtype, weight: NF4, dtype: torch.dtype) -> bool:
    """True if the compiled code has the product of an `a` of that dtype and `weight` with a result of `dtype`."""
    k, blocksize = weight.columns, weight.blocksize
    # Blocks are powers of two wherever they come from a checked weight.
    if weight.rows == 0 or k == 0 or blocksize < 32 or k % blocksize or blocksize & (blocksize - 1):
        return False
    return a in _TAKEN and dtype in _TAKEN and native.has_products()


def _fits_update(update: LowRank, rows: int, to: int, backward: bool) -> bool:
    low, up = update
    shape = (low.shape[1], to) if backward else (to, low.shape[1])
    fit = low.dtype == torch.float32 and low.shape[0] == rows and up.shape == shape
    return fit and up.is_cpu and up.is_floating_point() and has_memory(low) and has_memory(up)


def _has_bfloat16() -> bool:
    return native.level() == native.AVX512_BF16

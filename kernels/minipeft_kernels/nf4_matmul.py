"""y = x W^T + b with W in NF4, and its input gradient dx = dy W (Dettmers et al. 2023, equation 5).

The reference decodes W a few rows at a time, so the float matrix never exists whole, forward or backward. Only the
packed weight is kept between the two; W is frozen, so x is not needed again. The kernels read the packed weight
itself: on a GPU `nf4_matmul_triton` says how, `nf4_route_triton` when; on a CPU `nf4_native`. Their smallest tiles are
for decoding a token at a time (a product of one row), so there is no operation of its own for that.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import nf4_native
from .arithmetic import arithmetic_dtype
from .dispatch import runs_native, use_native, use_triton
from .nf4_dequantize import decode_into, dequantize_absmax, level_pairs
from .nf4_quantize import WEIGHT_DTYPES
from .registration import below_autograd, computes_only, define_op, forward_mode, without_autocast

# codes, absmax, quant_map, nested_absmax, nested_map, offset: the tensors that an NF4 weight is.
Packed = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
# out_features, in_features, blocksize, nested_blocksize
Sizes = tuple[int, int, int, int]

PACKED_SCHEMA = (
    "Tensor codes, Tensor absmax, Tensor quant_map, Tensor? nested_absmax, Tensor? nested_map, Tensor? offset"
)
SIZES_SCHEMA = "SymInt out_features, SymInt in_features, int blocksize, int nested_blocksize"

# Weights decoded at a time, as whole rows of W. 4096x4096 float32, M = 16, forward on one thread: 15.3 ms at 2^17,
# 13.0 at 2^19, 12.9 at 2^20, 14.6 at 2^21, and 41 with W decoded whole; with M = 256 it is 98 at 2^20 and 122 whole.
CHUNK = 1 << 20


def nf4_matmul(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    blocksize: int,
    nested_blocksize: int = 256,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + b, differentiable in x and b.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        codes: uint8 ((out_features * in_features + 1)//2, 1).
        absmax: float32 (blocks,), or uint8 when doubly quantized, with the three tensors below.
        quant_map: float32 (16,).
        nested_absmax, nested_map, offset: as `dequantize_absmax` takes them, or all None.
        out_features, in_features: rows and columns of W.
        blocksize, nested_blocksize: weights that share a scale, scales that share a nested scale.
        bias: (out_features,) or None.
        compute_dtype: of the product; None for x's. On a CPU that lacks it, float32 (see `arithmetic_dtype`).

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        TypeError: another dtype. ValueError: x has not in_features columns.
    """
    check_input(x, in_features)
    packed = (codes, absmax, quant_map, nested_absmax, nested_map, offset)
    sizes = (out_features, in_features, blocksize, nested_blocksize)
    alone = computes_only(x, bias) and not forward_mode()
    if alone and bias is None and compute_dtype in (None, x.dtype) and runs_native(x):
        y = nf4_native.product(x, packed, sizes, x.dtype)
        if y is not None:
            return y
    call = _run_nf4_matmul if alone else _nf4_matmul_op
    out: Tensor = call(x, bias, *packed, *sizes, compute_dtype or x.dtype)
    return out


def check_input(x: Tensor, in_features: int) -> None:
    """Raise unless x can be multiplied by an NF4 weight of so many columns."""
    if x.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}: convert it, for example with .float()")
    if x.shape[-1] != in_features:
        raise ValueError(f"x's last dimension ({x.shape[-1]}) must be in_features ({in_features})")


def multiply(x: Tensor, packed: Packed, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """x W^T, computed in x's dtype: (..., K) -> (..., N) in `dtype`; compiled, or by `multiply_reference`."""
    y = nf4_native.product(x, packed, sizes, dtype) if use_native(x) else None
    if y is not None:
        return y
    return from_rows(multiply_reference(as_rows(x), packed, sizes), x).to(dtype)


def multiply_back(dy: Tensor, packed: Packed, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """dy W, likewise: (..., N) -> (..., K) in `dtype`."""
    dx = nf4_native.product(dy, packed, sizes, dtype, backward=True) if use_native(dy) else None
    if dx is not None:
        return dx
    return from_rows(multiply_back_reference(as_rows(dy), packed, sizes), dy).to(dtype)


def multiply_reference(rows: Tensor, packed: Packed, sizes: Sizes) -> Tensor:
    """rows W^T in PyTorch, W decoded a chunk at a time: (M, K) -> (M, N), in the dtype of rows."""
    y = rows.new_zeros(rows.shape[0], sizes[0])
    for start, stop, w in decoded_rows(packed, sizes, rows.dtype):
        torch.mm(rows, w.t(), out=y[:, start:stop])
    return y


def multiply_back_reference(rows: Tensor, packed: Packed, sizes: Sizes) -> Tensor:
    """rows W in PyTorch: (M, N) -> (M, K) float32. The sum over W's rows is cut into chunks: they add up in float32."""
    total = rows.new_zeros(rows.shape[0], sizes[1], dtype=torch.float32)
    for start, stop, w in decoded_rows(packed, sizes, rows.dtype):
        if rows.dtype == torch.float32:
            total.addmm_(rows[:, start:stop], w)
        else:
            total += rows[:, start:stop] @ w
    return total


def as_rows(x: Tensor) -> Tensor:
    """(..., n) -> (rows, n); -1 would not do where n is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """(rows, n) -> (..., n), laid out as x. No view to autograd: models go on in place on what a layer returns."""
    out: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))
    return out


def decoded_rows(packed: Packed, sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first row, last row + 1, those rows of W in `dtype`), a chunk at a time in buffers used again."""
    out_features, in_features = sizes[:2]
    if out_features * in_features == 0:
        return
    step = min(max(1, CHUNK // in_features), out_features)
    decode = _native_decoder if use_native(packed[0]) else _reference_decoder
    rows = decode(packed, sizes, dtype, step)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        yield start, stop, rows(start, stop).view(-1, in_features)


# Gives the weights of rows start..stop-1 in a buffer that the next call overwrites.
Decoder = Callable[[int, int], Tensor]


def _native_decoder(packed: Packed, sizes: Sizes, dtype: torch.dtype, step: int) -> Decoder:
    in_features = sizes[1]
    buffer = torch.empty(step * in_features, dtype=dtype)

    def rows(start: int, stop: int) -> Tensor:
        out = buffer[: (stop - start) * in_features]
        return nf4_native.decode_into(out, packed, sizes, start * in_features, stop * in_features)

    return rows


def _reference_decoder(packed: Packed, sizes: Sizes, dtype: torch.dtype, step: int) -> Decoder:
    codes, absmax, quant_map, nested_absmax, nested_map, offset = packed
    _, in_features, blocksize, nested_blocksize = sizes
    if nested_absmax is not None:
        assert nested_map is not None and offset is not None
        absmax = dequantize_absmax(absmax, nested_absmax, nested_map, offset, nested_blocksize)
    flat = codes.reshape(-1)
    pairs = level_pairs(quant_map)
    # Rows need not start or end where a block does: up to two more blocks are decoded, and the rows cut out.
    size = min(2 * flat.numel(), step * in_features + 2 * blocksize)
    buffer = torch.empty(size, dtype=torch.float32, device=codes.device)
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    cast = None if dtype == torch.float32 else torch.empty(step * in_features, dtype=dtype, device=codes.device)

    def rows(start: int, stop: int) -> Tensor:
        first = start * in_features // blocksize * blocksize
        last = -(-stop * in_features // blocksize) * blocksize
        part = flat[first // 2 : last // 2]
        scales = absmax[first // blocksize :]
        w = decode_into(buffer[: 2 * part.numel()], part, scales, pairs, blocksize, index)
        w = w[start * in_features - first : stop * in_features - first]
        return w if cast is None else cast[: w.numel()].copy_(w)

    return rows


class _NF4Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*args[:6])
        ctx.rest = (*args[6:], x.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with below_autograd():
            y: Tensor = _nf4_matmul_op(x, bias, *args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _nf4_matmul_input_grad_op(dy, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
        db = bias_gradient(dy, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return dx, db, *(None,) * 11


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., N) -> (N,): the sum over rows, added up in float32."""
    return as_rows(dy).sum(0, dtype=torch.float32).to(dtype)


def _run_nf4_matmul(x: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    packed, sizes, compute_dtype = args[:6], args[6:10], args[10]
    with without_autocast():
        if use_triton(x):
            from .nf4_route_triton import multiply as multiply_triton

            y = multiply_triton(as_rows(x).to(compute_dtype), packed, sizes, bias)
            return from_rows(y, x).to(x.dtype)
        a = cast(x, arithmetic_dtype(compute_dtype, x.device))
        if bias is None:
            return multiply(a, packed, sizes, x.dtype)
        # Added before the sum is rounded.
        return multiply(a, packed, sizes, torch.float32).add_(bias).to(x.dtype)


def _run_nf4_matmul_input_grad(dy: Tensor, *args: Any) -> Tensor:
    packed, sizes, compute_dtype, dtype = args[:6], args[6:10], args[10], args[11]
    with without_autocast():
        if use_triton(dy):
            from .nf4_route_triton import multiply_back as multiply_back_triton

            dx = multiply_back_triton(as_rows(dy).to(compute_dtype), packed, sizes)
            return from_rows(dx, dy).to(dtype)
        return multiply_back(cast(dy, arithmetic_dtype(compute_dtype, dy.device)), packed, sizes, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`: x itself where it is in it, without asking torch, which takes a microsecond to find that out."""
    return x if x.dtype == dtype else x.to(dtype)


_nf4_matmul_op = define_op(
    f"nf4_matmul(Tensor x, Tensor? bias, {PACKED_SCHEMA}, {SIZES_SCHEMA}, ScalarType compute_dtype) -> Tensor",
    _run_nf4_matmul,
    fake=lambda x, bias, *args: x.new_empty(*x.shape[:-1], args[6]),
    autograd=_NF4Matmul,
)
_nf4_matmul_input_grad_op = define_op(
    f"nf4_matmul_input_grad(Tensor dy, {PACKED_SCHEMA}, {SIZES_SCHEMA}, ScalarType compute_dtype, ScalarType dtype)"
    " -> Tensor",
    _run_nf4_matmul_input_grad,
    fake=lambda dy, *args: dy.new_empty(*dy.shape[:-1], args[7], dtype=args[11]),
)

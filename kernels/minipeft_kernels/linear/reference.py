"""Products with an NF4 weight in PyTorch: W is decoded a few rows at a time, so the float matrix never exists whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..dispatch import use_native
from ..nf4.cpu import decode_range
from ..nf4.dequantize import decode_blocks, level_pairs, scales_of
from ..packed import NF4

# Weights decoded at a time, as whole rows of W. 4096x4096 float32, M = 16, forward on one thread: 15.3 ms at 2^17,
# 13.0 at 2^19, 12.9 at 2^20, 14.6 at 2^21, and 41 with W decoded whole; with M = 256 it is 98 at 2^20 and 122 whole.
CHUNK = 1 << 20


def multiply_reference(rows: Tensor, weight: NF4) -> Tensor:
    """rows W^T: (M, K) -> (M, N), computed and given in the dtype of `rows`."""
    y = rows.new_zeros(rows.shape[0], weight.rows)
    for start, stop, w in decoded_rows(weight, rows.dtype):
        torch.mm(rows, w.t(), out=y[:, start:stop])
    return y


def multiply_back_reference(rows: Tensor, weight: NF4) -> Tensor:
    """rows W: (M, N) -> (M, K) float32. The sum over W's rows is cut into chunks, which add up in float32."""
    total = rows.new_zeros(rows.shape[0], weight.columns, dtype=torch.float32)
    for start, stop, w in decoded_rows(weight, rows.dtype):
        if rows.dtype == torch.float32:
            total.addmm_(rows[:, start:stop], w)
        else:
            total += rows[:, start:stop] @ w
    return total


def decoded_rows(weight: NF4, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first row, last row + 1, those rows of W in `dtype`), a chunk at a time in buffers used again."""
    n, k = weight.rows, weight.columns
    if n * k == 0:
        return
    step = min(max(1, CHUNK // k), n)
    make_decoder = _native_decoder if use_native(weight.codes) else _reference_decoder
    decode = make_decoder(weight, dtype, step)
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield start, stop, decode(start, stop).view(-1, k)


Decoder = Callable[[int, int], Tensor]
"""Gives the weights of rows start..stop-1, flat, in a buffer that the next call overwrites."""


def _native_decoder(weight: NF4, dtype: torch.dtype, step: int) -> Decoder:
    """A decoder of up to `step` rows in compiled code."""
    k = weight.columns
    buffer = torch.empty(step * k, dtype=dtype)

    def decode(start: int, stop: int) -> Tensor:
        return decode_range(buffer[: (stop - start) * k], weight, start * k, stop * k)

    return decode


def _reference_decoder(weight: NF4, dtype: torch.dtype, step: int) -> Decoder:
    """A decoder of up to `step` rows in PyTorch."""
    k, blocksize = weight.columns, weight.blocksize
    scales, pairs, codes = scales_of(weight), level_pairs(weight.quant_map), weight.codes.reshape(-1)
    # Rows need not start or end where a block does: up to two more blocks are decoded, and the rows cut out.
    size = min(2 * codes.numel(), step * k + 2 * blocksize)
    buffer = torch.empty(size, dtype=torch.float32, device=codes.device)
    index = torch.empty(size // 2, dtype=torch.int32, device=codes.device)
    rounded = None if dtype == torch.float32 else torch.empty(step * k, dtype=dtype, device=codes.device)

    def decode(start: int, stop: int) -> Tensor:
        first = start * k // blocksize * blocksize
        last = -(-stop * k // blocksize) * blocksize
        part = codes[first // 2 : last // 2]
        w = decode_blocks(buffer[: 2 * part.numel()], part, scales[first // blocksize :], pairs, blocksize, index)
        w = w[start * k - first : stop * k - first]
        return w if rounded is None else rounded[: w.numel()].copy_(w)

    return decode

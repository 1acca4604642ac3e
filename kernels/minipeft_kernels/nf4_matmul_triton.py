"""Launchers of the fused products with a packed NF4 weight: y = x W^T + b + low up^T, and dx = dy W + low up.

`low up^T` is LoRA's update, for which the sum starts where the product's own would start at zero: with low = s x A^T
and up = B in the forward, low = s dy B and up = A in the gradient (Hu et al. 2021, equation 3). x A^T is a small
product of its own, kept for the backward; computing it in the main loop would repeat it for every tile of W's rows.

What the kernels do not take goes unfused (decode, then multiply): see `fused_obstacle`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .dispatch import capability, emulating, interpreting, on_device
from .nf4_matmul_configs import CHUNK, PORTABLE_ROWS, Tile, portable, split_for, tile_for
from .nf4_matmul_direct import _nf4_matmul_direct_kernel
from .nf4_matmul_staged import _nf4_matmul_staged_kernel
from .roofline import GPUS

NESTED_BLOCKSIZE = 256
# Ranks of the update multiplied at a time: what the tensor core takes at once. With more, registers spill.
RANK_TILE = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LowRank = tuple[Tensor, Tensor]
"""(low, up): (M, r) with the scaling in it, and (out_features, r) forward or (r, in_features) backward."""

_counters: dict[tuple[torch.device, int], Tensor] = {}


def fused_obstacle(dtype: torch.dtype, in_features: int, blocksize: int, nested_blocksize: int = 256) -> str:
    """Why the fused kernels cannot take such a product, or "" if they can."""
    if dtype not in DTYPES:
        return f"x must be float32, bfloat16 or float16, got {dtype}"
    if blocksize < CHUNK:
        return f"blocksize ({blocksize}) must be at least {CHUNK}"
    if in_features % blocksize:
        return f"in_features ({in_features}) must be a multiple of blocksize ({blocksize})"
    if nested_blocksize != NESTED_BLOCKSIZE:
        return f"nested_blocksize ({nested_blocksize}) must be {NESTED_BLOCKSIZE}"
    return ""


def nf4_matmul_forward(
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
    bias: Tensor | None = None,
    lora: LowRank | None = None,
) -> Tensor:
    """x W^T + bias + low up^T.

    Args:
        x: (M, in_features) float32, bfloat16 or float16, of any row stride.
        codes, absmax, quant_map, nested_absmax, nested_map, offset: as `nf4_matmul` takes them.
        out_features, in_features: of W; in_features a multiple of blocksize, a power of two from 64 on.
        bias: (out_features,) or None.
        lora: low (M, r) and up (out_features, r), rounded to x's dtype in the product; or None.

    Returns:
        (M, out_features) in x's dtype; accumulated in float32.
    """
    weight = (codes, absmax, quant_map, nested_absmax, nested_map, offset)
    return _launch(x, weight, out_features, in_features, blocksize, bias, lora, grad=False)


def nf4_matmul_input_grad(
    dy: Tensor,
    codes: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    blocksize: int,
    lora: LowRank | None = None,
) -> Tensor:
    """dy W + low up, from the same packed buffer, with no transposed copy.

    Args:
        dy: (M, out_features). lora: low (M, r) and up (r, in_features). The others as in `nf4_matmul_forward`.

    Returns:
        (M, in_features) in dy's dtype.
    """
    weight = (codes, absmax, quant_map, nested_absmax, nested_map, offset)
    return _launch(dy, weight, out_features, in_features, blocksize, None, lora, grad=True)


def _launch(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    out_features: int,
    in_features: int,
    blocksize: int,
    bias: Tensor | None,
    lora: LowRank | None,
    grad: bool,
) -> Tensor:
    obstacle = fused_obstacle(x.dtype, in_features, blocksize)
    if obstacle:
        raise ValueError(f"the fused NF4 kernels cannot run: {obstacle}")
    codes, absmax, levels, *nested = (None if t is None else t.contiguous() for t in weight)
    assert codes is not None and absmax is not None and levels is not None
    m = x.shape[0]
    width, depth = (in_features, out_features) if grad else (out_features, in_features)
    assert x.shape == (m, depth), (x.shape, depth)
    y = torch.empty(m, width, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    permute = can_permute(x)
    if codes.data_ptr() % 4:
        codes = codes.clone()  # read in words of four bytes; a view into another buffer may start anywhere

    chunks = in_features // CHUNK
    foreign = x.device.type not in ("cuda", "cpu") or torch.version.hip is not None
    rows = max(m, PORTABLE_ROWS) if foreign else m
    tile = tile_for(rows, grad, capability(x.device), x.dtype == torch.float32, blocksize)
    tile = portable(tile) if foreign else tile
    tiles, steps = grid_of(tile, m, out_features, chunks, grad)
    split = split_for(tiles, steps, m, depth, tile.warps, _multiprocessors(x.device))
    size = tile.rows * (CHUNK if grad else tile.bn)
    low, up = lora or (x, x)
    arguments: tuple[Any, ...] = (
        *(x, codes, absmax, levels),
        *(levels if t is None else t for t in nested),
        *(x if bias is None else bias, low.contiguous(), up.contiguous(), y),
        *_workspace(x.device, tiles, split, size),
        *(m, out_features, chunks, x.stride(0), low.shape[1]),
    )
    constants = constants_of(tile, out_features, chunks, blocksize, split, grad)
    constants.update(
        RT=RANK_TILE if lora else 0,
        DOUBLE=nested[0] is not None,
        HAS_BIAS=bias is not None,
        PRMT=permute,
        UPCAST=interpreting(),
    )
    kernel = _nf4_matmul_direct_kernel if tile.kernel == "direct" else _nf4_matmul_staged_kernel
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    with on_device(x):
        kernel[(tiles, split)](*arguments, **constants, **options)
    return y


def can_permute(x: Tensor) -> bool:
    """Whether levels are decoded by byte permutes: 16-bit products on NVIDIA hardware."""
    nvidia = (x.is_cuda and torch.version.hip is None) or emulating(x.device)
    return nvidia and x.element_size() == 2 and not interpreting()


def grid_of(tile: Tile, rows: int, out_features: int, chunks: int, grad: bool) -> tuple[int, int]:
    """(tiles of the output, steps of the loop in one tile)."""
    columns = chunks if grad else triton.cdiv(out_features, tile.bn)
    steps = triton.cdiv(out_features, tile.bn) if grad else triton.cdiv(chunks, tile.nb)
    return columns * triton.cdiv(rows, tile.rows), steps


def constants_of(
    tile: Tile, out_features: int, chunks: int, blocksize: int, split: int, grad: bool
) -> dict[str, int | bool]:
    """The constants that a tile's kernel is compiled with, except for those of the operands."""
    constants: dict[str, int | bool] = {
        "BM": tile.rows,
        "BN": tile.bn,
        "CHUNK": CHUNK,
        "SHIFT": (blocksize // CHUNK).bit_length() - 1,
        "SPLIT": split,
    }
    if tile.kernel == "direct":
        return constants | {"NB": tile.nb, "EVEN": chunks % tile.nb == 0}
    return constants | {"GRAD": grad, "EVEN": out_features % tile.bn == 0}


def _workspace(device: torch.device, tiles: int, split: int, size: int) -> tuple[Tensor, Tensor]:
    """Room for partial sums, and counters that are zero before every launch and after it."""
    if split == 1:
        nothing = torch.empty(0, dtype=torch.float32, device=device)
        return nothing, nothing
    partial = torch.empty(tiles * split * size, dtype=torch.float32, device=device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return partial, torch.zeros(tiles, dtype=torch.int32, device=device)
    # Launches of one stream follow each other, so they may share counters; two streams may not.
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    counters = _counters.get(key)
    if counters is None or counters.numel() < tiles:
        counters = _counters[key] = torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device)
    return partial, counters


def _multiprocessors(device: torch.device) -> int:
    if emulating(device):
        # As many as the first GPU of that kind has, so that programs share tiles as they would there.
        return next(gpu.multiprocessors for gpu in GPUS if gpu.capability == capability(device))
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count

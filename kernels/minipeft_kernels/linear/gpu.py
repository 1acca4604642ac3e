"""Products with an NF4 weight on a GPU: y = x W^T + b + low up^T, and dx = dy W + low up.

`low up^T` is LoRA's update, for which the sum starts where the product's own would start at zero: with low = s x A^T
and up = B in the forward, low = s dy B and up = A in the gradient (Hu et al. 2021, equation 3). x A^T is a small
product of its own, kept for the backward; computing it in the main loop would repeat it for every tile of W's rows.

With few rows a product is bound by the weight's bytes, and reading a quarter of them wins: one fused kernel. With many
it is bound by arithmetic, decoding W again for every tile costs more than writing it out once, and the vendor's product
is the better one: W is decoded whole, then multiplied. `tiles` has the number of rows where that turns, and what the
fused kernels do not take goes the second way too (see `fused_obstacle`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..dispatch import capability, emulating, interpreting, multiprocessors, on_device
from ..experts.stack import NF4Stack, check_stack_for_kernel
from ..nf4.checks import check_for_kernel
from ..nf4.dequantize_triton import dequantize_into
from ..packed import NF4
from .checks import check_addends
from .direct import _nf4_matmul_direct_kernel
from .low_rank import LowRank
from .staged import _nf4_matmul_staged_kernel
from .tiles import CHUNK, PORTABLE_ROWS, Tile, fused_max_rows, portable, rows_each, split_for, tile_for

NESTED_BLOCKSIZE = 256
# Ranks of the update multiplied at a time: what the tensor core takes at once. With more, registers spill.
RANK_TILE = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_counters: dict[tuple[torch.device, int], Tensor] = {}


def forward(
    rows: Tensor, weight: NF4, bias: Tensor | None, update: LowRank | None, compute_dtype: torch.dtype
) -> Tensor:
    """rows W^T + b + low up^T: (M, K) -> (M, N) in `compute_dtype`; `update` is (low (M, r), up (N, r))."""
    rows = rows.to(compute_dtype)
    if is_fused(rows, weight):
        return launch_forward(rows, weight, bias, update)
    w = _decoded(weight, rows.dtype)
    y = rows @ w.t() if bias is None else torch.addmm(bias.to(rows.dtype), rows, w.t())
    if update is not None:
        low, up = update
        y.addmm_(low.to(y.dtype), up.to(y.dtype).t())
    return y


def input_gradient(rows: Tensor, weight: NF4, update: LowRank | None, compute_dtype: torch.dtype) -> Tensor:
    """rows W + low up: (M, N) -> (M, K) in `compute_dtype`; `update` is (low (M, r), up (r, K))."""
    rows = rows.to(compute_dtype)
    if is_fused(rows, weight):
        return launch_input_gradient(rows, weight, update)
    dx = rows @ _decoded(weight, rows.dtype)
    if update is not None:
        low, up = update
        dx.addmm_(low.to(dx.dtype), up.to(dx.dtype))
    return dx


def is_fused(rows: Tensor, weight: NF4) -> bool:
    """True if a product of these rows runs as one kernel; otherwise the weight is decoded first."""
    if fused_obstacle(rows.dtype, weight.columns, weight.blocksize, weight.nested_blocksize):
        return False
    limit = fused_max_rows(capability(rows.device), rows.dtype == torch.float32)
    return limit is None or rows.shape[0] <= limit


def _decoded(weight: NF4, dtype: torch.dtype) -> Tensor:
    """W decoded whole, (N, K). The caching allocator gives every layer the same memory for it, one after the other."""
    return dequantize_into(torch.empty(weight.rows, weight.columns, dtype=dtype, device=weight.codes.device), weight)


def fused_obstacle(dtype: torch.dtype, in_features: int, blocksize: int, nested_blocksize: int = 256) -> str:
    """The reason why the fused kernels cannot take such a product, or "" if they can."""
    if dtype not in DTYPES:
        return f"x must be float32, bfloat16 or float16, got {dtype}"
    if blocksize < CHUNK:
        return f"blocksize ({blocksize}) must be at least {CHUNK}"
    if in_features % blocksize:
        return f"in_features ({in_features}) must be a multiple of blocksize ({blocksize})"
    if nested_blocksize != NESTED_BLOCKSIZE:
        return f"nested_blocksize ({nested_blocksize}) must be {NESTED_BLOCKSIZE}"
    return ""


def launch_forward(x: Tensor, weight: NF4, bias: Tensor | None = None, update: LowRank | None = None) -> Tensor:
    """x W^T + bias + low up^T by the fused kernel.

    Args:
        x: (M, in_features) float32, bfloat16 or float16, of any row stride.
        weight: its columns are a multiple of blocksize, which is a power of two from 64 on.
        bias: (out_features,) or None.
        update: low (M, r) and up (out_features, r), rounded to x's dtype in the product; or None.

    Returns:
        (M, out_features) in x's dtype; accumulated in float32.

    Raises:
        ValueError: the kernel does not take such a product (see `fused_obstacle`).
    """
    return launch(x, weight, bias, update, grad=False)


def launch_input_gradient(dy: Tensor, weight: NF4, update: LowRank | None = None) -> Tensor:
    """dy W + low up by the fused kernel, from the same packed buffer, with no transposed copy.

    Args:
        dy: (M, out_features). update: low (M, r) and up (r, in_features). weight: as `launch_forward`'s.

    Returns:
        (M, in_features) in dy's dtype.

    Raises:
        ValueError: as `launch_forward`.
    """
    return launch(dy, weight, None, update, grad=True)


def launch(
    x: Tensor,
    weight: NF4 | NF4Stack,
    bias: Tensor | None,
    update: LowRank | None,
    grad: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    """Choose the tile for the rows and the GPU, divide the work among programs, and launch the fused kernel.

    Args:
        x: (M, in_features), or for the input gradient (`grad`) dy (M, out_features).
        weight: the kernels read its bytes in words of four: codes that start elsewhere are copied.
        bias, update: as in `launch_forward` and `launch_input_gradient`.
        offsets: of a stack, int32 (experts,) on x's device, where each expert's rows end; up is one matrix an expert.

    Returns:
        (M, out_features), or for the input gradient (M, in_features), in x's dtype.

    The grid is (tiles of the output, programs that share a tile). Programs of one tile add up their partial sums in a
    workspace, and the last of them, found by a counter, writes the tile: so few large tiles still fill the GPU. How
    many tiles the rows of experts take only the GPU knows: the grid has as many as there can be.
    """
    obstacle = fused_obstacle(x.dtype, weight.columns, weight.blocksize)
    if obstacle:
        raise ValueError(f"the fused NF4 kernels cannot run: {obstacle}")
    m, n, k = x.shape[0], weight.rows, weight.columns
    width, depth = (k, n) if grad else (n, k)
    low, up = update or (None, None)
    if x.shape != (m, depth):
        raise ValueError(f"x must be ({m}, {depth}), as the NF4 weight has it, got {tuple(x.shape)}")
    each_up = up
    if isinstance(weight, NF4Stack):
        check_stack_for_kernel(weight, offsets, up, x.device)
        each_up = None if up is None else up[0]
    else:
        check_for_kernel(weight, x.device)
    check_addends(m, width, x.device, bias, low, each_up.T if each_up is not None and grad else each_up)
    y = torch.empty(m, width, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()

    chunks = k // CHUNK
    experts = 0 if offsets is None else offsets.shape[0]
    each = rows_each(m, experts) if experts else m
    foreign = x.device.type not in ("cuda", "cpu") or torch.version.hip is not None
    rows = max(each, PORTABLE_ROWS) if foreign else each
    tile = tile_for(rows, grad, capability(x.device), x.dtype == torch.float32, weight.blocksize)
    tile = portable(tile) if foreign else tile
    # Each expert with rows, and nobody, may end in a tile that is not full.
    parts = min(experts + 1, m) if experts else 1
    row_tiles = parts + (m - parts) // tile.rows
    tiles, steps = grid_of(tile, row_tiles, n, chunks, grad)
    split = split_for(tiles, steps, each, depth, tile.warps, multiprocessors(x.device))
    size = tile.rows * (CHUNK if grad else tile.bn)
    # A bias, update or nested scale that is missing is not read; the kernel must be given some pointer all the same.
    low, up = update or (x, x)
    up = up.contiguous() if grad else up
    arguments: tuple[Any, ...] = (
        *(x, *_pointers(weight)),
        *(x if bias is None else bias.contiguous(), low.contiguous(), up, y),
        *_workspace(x.device, tiles, split, size),
        *(x if offsets is None else offsets.contiguous(), m, n, chunks, x.stride(0), low.shape[1]),
        *(experts, up.stride(0) if experts else 0, up.stride(-2), up.stride(-1)),
    )
    constants = constants_of(tile, n, chunks, weight.blocksize, split, grad)
    constants.update(
        RT=RANK_TILE if update else 0,
        DOUBLE=weight.nested_absmax is not None,
        HAS_BIAS=bias is not None,
        PRMT=can_permute(x),
        UPCAST=interpreting(),
        EXPERTS=triton.next_power_of_2(experts + 1) if experts else 0,
    )
    kernel = _nf4_matmul_direct_kernel if tile.kernel == "direct" else _nf4_matmul_staged_kernel
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    with on_device(x):
        kernel[(tiles, split)](*arguments, **constants, **options)
    return y


def _pointers(weight: NF4 | NF4Stack) -> list[Tensor]:
    """The weight's six tensors as the kernels take them: contiguous, the codes at a multiple of four bytes."""
    codes, *others = (None if t is None else t.contiguous() for t in weight.tensors())
    assert codes is not None
    if codes.data_ptr() % 4:
        codes = codes.clone()  # a view into another buffer may start anywhere
    return [codes, *(weight.quant_map if t is None else t for t in others)]


def can_permute(x: Tensor) -> bool:
    """True if levels are decoded by byte permutes: 16-bit products on NVIDIA hardware."""
    nvidia = (x.is_cuda and torch.version.hip is None) or emulating(x.device)
    return nvidia and x.element_size() == 2 and not interpreting()


def grid_of(tile: Tile, row_tiles: int, out_features: int, chunks: int, grad: bool) -> tuple[int, int]:
    """(tiles of the output, steps of the loop in one tile)."""
    columns = chunks if grad else triton.cdiv(out_features, tile.bn)
    steps = triton.cdiv(out_features, tile.bn) if grad else triton.cdiv(chunks, tile.nb)
    return columns * row_tiles, steps


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

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

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..arithmetic import cast
from ..dispatch import capability, has_permutes, interpreting, multiprocessors, on_device, triton_version
from ..experts.stack import NF4Stack, check_stack_for_kernel
from ..nf4.checks import check_for_kernel
from ..nf4.dequantize_triton import dequantize_into
from ..packed import NF4
from ..prepared import ALIGNMENT, Prepared
from .checks import check_addends
from .counters import workspace
from .direct import _nf4_matmul_direct_kernel
from .low_rank import LowRank
from .staged import _nf4_matmul_staged_kernel
from .tables import Table, table_on
from .tiles import CHUNK, EIGHT_ROWS, PORTABLE_ROWS, Tile, fused_max_rows, portable, rows_each, split_for, tile_for

NESTED_BLOCKSIZE = 256
# Ranks of the update multiplied at a time: what the tensor core takes at once. With more, registers spill.
RANK_TILE = 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(
    rows: Tensor, weight: NF4, bias: Tensor | None, update: LowRank | None, compute_dtype: torch.dtype
) -> Tensor:
    """rows W^T + b + low up^T: (M, K) -> (M, N) in `compute_dtype`; `update` is (low (M, r), up (N, r))."""
    rows = cast(rows, compute_dtype)
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
    rows = cast(rows, compute_dtype)
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
    limit = fused_max_rows(capability(rows.device), rows.dtype == torch.float32, table_on(rows.device))
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
    m, depth = x.shape[0], x.shape[-1]
    device, dtype = x.device, x.dtype
    experts = 0 if offsets is None else offsets.shape[0]
    low, up = update or (None, None)
    operands = (
        *(m, weight.rows, weight.columns, weight.blocksize, experts, dtype, grad),
        *(weight.nested_absmax is not None, bias is not None, update is not None),
    )
    gpu = (capability(device), multiprocessors(device), can_permute(x), not (x.is_cuda or x.is_cpu))
    plan = _planned(tile_for, split_for, table_on(device), *operands, *gpu)
    if depth != plan.depth or x.dim() != 2:
        raise ValueError(f"x must be ({m}, {plan.depth}), as the NF4 weight has it, got {tuple(x.shape)}")
    each_up = up
    if isinstance(weight, NF4Stack):
        check_stack_for_kernel(weight, offsets, up, device)
        each_up = None if up is None else up[0]
    else:
        check_for_kernel(weight, device)
    if bias is not None or update is not None:
        check_addends(m, plan.width, device, bias, low, each_up.T if each_up is not None and grad else each_up)
    y = torch.empty(m, plan.width, dtype=dtype, device=device)
    if plan.launch is None:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    # A bias, update or nested scale that is missing is not read; the kernel must be given some pointer all the same.
    low, up = update or (x, x)
    low, up = low.contiguous(), up.contiguous() if grad else up
    bias = x if bias is None else bias.contiguous()
    tensors = (
        *(x, *_pointers(weight), bias, low, up, y, *workspace(device, plan.tiles, plan.split, plan.size)),
        x if offsets is None else offsets.contiguous(),
    )
    pitch, strides = x.stride(0), up.stride()
    numbers = (
        *(m, weight.rows, plan.chunks, pitch, low.shape[1]),
        *(experts, strides[0] if experts else 0, strides[-2], strides[-1], plan.split),
    )
    # Beside these Triton looks at the dtypes, rows and columns of the weight, which go with the plan.
    key = (bias.dtype, low.dtype, up.dtype, pitch % ALIGNMENT == 0, pitch == 1)
    with on_device(x):
        plan.launch(tensors, numbers, key)
    return y


@dataclass(frozen=True, slots=True)
class Plan:
    """The launch of a product of one shape, and its sizes.

    Attributes:
        width, depth: of y, and of what is summed over. chunks: of a row of W.
        tiles: of the output. split: programs that share one. size: of a tile.
        launch: the kernel with its grid and constants; None for an empty y.
    """

    width: int
    depth: int
    chunks: int
    tiles: int
    split: int
    size: int
    launch: Prepared | None


@functools.lru_cache(maxsize=4096)
def _planned(
    tile_for: Callable[..., Tile],
    split_for: Callable[..., int],
    tuned: Table | None,
    m: int,
    n: int,
    k: int,
    blocksize: int,
    experts: int,
    dtype: torch.dtype,
    grad: bool,
    double: bool,
    has_bias: bool,
    has_update: bool,
    capability: int,
    multiprocessors: int,
    permute: bool,
    foreign: bool,
) -> Plan:
    """The plan of a product of m rows with an (n, k) weight, or with `experts` of them, in `dtype`.

    Args:
        tile_for, split_for: the rules of `tiles`; as arguments, so that other rules give other plans.
        tuned: the GPU's own table, which goes before them; a table that is read again is another one.
        double, has_bias, has_update: which operands there are. permute: `can_permute`.
        foreign: the GPU is of a maker that PyTorch does not call CUDA.
    """
    obstacle = fused_obstacle(dtype, k, blocksize)
    if obstacle:
        raise ValueError(f"the fused NF4 kernels cannot run: {obstacle}")
    width, depth = (k, n) if grad else (n, k)
    chunks = k // CHUNK
    if m * width == 0:
        return Plan(width, depth, chunks, 0, 1, 0, None)
    foreign = foreign or torch.version.hip is not None
    each = rows_each(m, experts) if experts else m
    rows = max(each, PORTABLE_ROWS) if foreign or triton_version() < EIGHT_ROWS else each
    tile = tile_for(rows, grad, capability, dtype == torch.float32, blocksize, tuned)
    tile = portable(tile) if foreign else tile
    # Each expert with rows, and nobody, may end in a tile that is not full.
    parts = min(experts + 1, m) if experts else 1
    row_tiles = parts + (m - parts) // tile.rows
    tiles, steps = grid_of(tile, row_tiles, n, chunks, grad)
    split = split_for(tiles, steps, each, depth, tile, multiprocessors)
    constants = constants_of(tile, n, chunks, blocksize, grad)
    constants.update(
        RT=RANK_TILE if has_update else 0,
        DOUBLE=double,
        HAS_BIAS=has_bias,
        PRMT=permute,
        UPCAST=interpreting(),
        EXPERTS=triton.next_power_of_2(experts + 1) if experts else 0,
    )
    kernel = _nf4_matmul_direct_kernel if tile.kernel == "direct" else _nf4_matmul_staged_kernel
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    launch = Prepared(kernel, (tiles, split), constants, options)
    return Plan(width, depth, chunks, tiles, split, tile.rows * (CHUNK if grad else tile.bn), launch)


def _pointers(weight: NF4 | NF4Stack) -> list[Tensor]:
    """The weight's six tensors as the kernels take them: contiguous, the codes at a multiple of four bytes."""
    missing = weight.quant_map
    given = [missing if t is None else t if t.is_contiguous() else t.contiguous() for t in weight.tensors()]
    if given[0].data_ptr() % 4:
        given[0] = given[0].clone()  # a view into another buffer may start anywhere
    return given


def can_permute(x: Tensor) -> bool:
    """True if levels are decoded by byte permutes: 16-bit products on NVIDIA hardware."""
    return x.element_size() == 2 and has_permutes(x.device)


def grid_of(tile: Tile, row_tiles: int, out_features: int, chunks: int, grad: bool) -> tuple[int, int]:
    """(tiles of the output, steps of the loop in one tile)."""
    # Not `triton.cdiv`, which takes 2.7 microseconds to divide: it may be called in device code, too.
    across = -(-out_features // tile.bn)
    columns = chunks if grad else across
    steps = across if grad else -(-chunks // tile.nb)
    return columns * row_tiles, steps


def constants_of(tile: Tile, out_features: int, chunks: int, blocksize: int, grad: bool) -> dict[str, int | bool]:
    """The constants that a tile's kernel is compiled with, except for those of the operands."""
    constants: dict[str, int | bool] = {
        "BM": tile.rows,
        "BN": tile.bn,
        "CHUNK": CHUNK,
        "SHIFT": (blocksize // CHUNK).bit_length() - 1,
    }
    if tile.kernel == "direct":
        return constants | {"NB": tile.nb, "EVEN": chunks % tile.nb == 0}
    return constants | {"GRAD": grad, "EVEN": out_features % tile.bn == 0}

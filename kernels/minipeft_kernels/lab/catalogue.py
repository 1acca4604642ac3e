"""Every kernel that is shipped, in each configuration, described so that it can be compiled without a GPU.

Types and constants are those that the launchers give for a Llama layer: pointers and sizes multiples of 16, doubly
quantized weights with blocksize 64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton import next_power_of_2

from ..adamw.triton import CHUNK as ADAMW_CHUNK
from ..adamw.triton import CHUNK_8BIT, STATE_BLOCKSIZE, _adamw_8bit_kernel, _adamw_kernel
from ..adamw.triton import NUM_WARPS as ADAMW_WARPS
from ..emulator.lanes import WARP
from ..linear.decode import UNSPECIALIZED
from ..linear.direct import _nf4_matmul_direct_kernel
from ..linear.gpu import NESTED_BLOCKSIZE, RANK_TILE, constants_of
from ..linear.staged import _nf4_matmul_staged_kernel
from ..linear.thin_triton import _thin_product_kernel
from ..linear.thin_triton import constants_of as thin_constants_of
from ..linear.thin_triton import tile_for as thin_tile_for
from ..linear.tiles import CHUNK, Tile, tile_for
from ..nf4.dequantize_triton import COLUMNS, ROWS, TILE_BYTES, _nf4_dequantize_kernel, _nf4_dequantize_pairs_kernel
from ..nf4.dequantize_triton import NUM_WARPS as DEQUANTIZE_WARPS
from ..nf4.quantize_triton import NESTED_ROWS, TILE, _nf4_quantize_kernel, _quantize_absmax_kernel
from ..nf4.quantize_triton import NUM_WARPS as QUANTIZE_WARPS

# A shape of Llama's, for the constants that depend on one.
TYPICAL_N, TYPICAL_K = 4096, 4096
BLOCKSIZE = 64

_DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


@dataclass(frozen=True)
class Kernel:
    """One kernel with everything that it is compiled with.

    Attributes:
        name: for the report. function: the Triton function.
        types: Triton's type of each argument, such as "*bf16" or "i32". constants: of the constexpr arguments.
        warps, stages: of a program. options: further ones of the compiler.
        elements: weights that a thread decodes in a turn of the inner loop, or numbers of x that it multiplies; or if
            the kernel has no loop, elements that a thread handles at all.
        rows: of x in a tile; 0 if it is no product with a packed weight. grad: it is the input gradient.
        tensor_cores: whether it must use them.
    """

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    options: dict[str, Any]
    elements: float
    rows: int = 0
    grad: bool = False
    tensor_cores: bool = False


def shipped(capability: int, dtype: str = "bf16") -> list[Kernel]:
    """All kernels for a capability (80 for 8.0): products, conversions, optimizer."""
    return [*matmul_kernels(capability, dtype), *thin_kernels(capability, dtype), *streaming_kernels(dtype)]


def matmul_kernels(
    capability: int,
    dtype: str = "bf16",
    double: bool = True,
    rank: int = 0,
    blocksize: int = BLOCKSIZE,
    experts: int = 0,
) -> list[Kernel]:
    """The products with a packed weight, or with those of `experts` experts, forward and backward.

    In each tile that is shipped for a capability.
    """
    kernels = []
    for grad in (False, True):
        tiles = {tile_for(m, grad, capability, dtype == "fp32", blocksize): None for m in (1, 16, 32, 64, 128)}
        kernels += [matmul_kernel(tile, grad, dtype, double, rank, blocksize, experts) for tile in tiles]
    return kernels


def matmul_kernel(
    tile: Tile,
    grad: bool,
    dtype: str = "bf16",
    double: bool = True,
    rank: int = 0,
    blocksize: int = BLOCKSIZE,
    experts: int = 0,
) -> Kernel:
    """One product in one tile, for a weight whose shape the tile divides."""
    constants: dict[str, Any] = dict(constants_of(tile, TYPICAL_N, TYPICAL_K // CHUNK, blocksize, grad))
    constants |= {"RT": RANK_TILE if rank else 0, "DOUBLE": double, "HAS_BIAS": False}
    constants |= {"PRMT": dtype != "fp32", "UPCAST": False, "EXPERTS": next_power_of_2(experts + 1) if experts else 0}
    floats = ("levels", "nested_absmax", "nested_map", "offset", "low", "up", "workspace")
    types = dict.fromkeys(("x", "bias", "y"), f"*{dtype}") | dict.fromkeys(floats, "*fp32")
    types |= {"codes": "*u8", "absmax": "*u8" if double else "*fp32", "counters": "*i32"}
    types |= {"offsets": "*i32"} | dict.fromkeys(("N", "row_chunks", "x_stride", *UNSPECIALIZED), "i32")
    name = f"{'dy W' if grad else 'x W^T'} {dtype} {tile.rows}x{tile.bn}x{CHUNK * tile.nb} {tile.kernel}"
    name += (f" r={rank}" if rank else "") + ("" if double else " single")
    name += f" {experts} experts" if experts else ""
    name += "" if blocksize == BLOCKSIZE else f" blocks of {blocksize}"
    return Kernel(
        name,
        _nf4_matmul_direct_kernel if tile.kernel == "direct" else _nf4_matmul_staged_kernel,
        types,
        constants,
        tile.warps,
        tile.stages,
        options={"enable_fp_fusion": True},
        elements=tile.bn * CHUNK * tile.nb / (WARP * tile.warps),
        rows=tile.rows,
        grad=grad,
        tensor_cores=dtype != "fp32",
    )


def thin_kernels(capability: int, dtype: str = "bf16") -> list[Kernel]:
    """LoRA's small products, each in the tiles that are shipped for a capability, with a float32 factor.

    With a float16 x the factor is float16. None for float32, which the kernel does not take.
    """
    # By the product: whether it sums over rows, and the strides that are 1.
    uses = {
        "x A^T": (False, "f_depth", "out_rank"),
        "dy B": (False, "f_rank", "out_rank"),
        "g^T x": (True, "f_rank", "out_row"),
        "dy^T low": (True, "f_rank", "out_rank"),
    }
    kernels = []
    if dtype == "fp32":
        return []
    sizes = list(itertools.product((1, 64, TYPICAL_N, 2 * TYPICAL_N), (16, 32, 64)))
    for name, (over_rows, *ones) in uses.items():
        for tile in dict.fromkeys(thin_tile_for(rows, rank, capability, over_rows) for rows, rank in sizes):
            constants: dict[str, Any] = dict(thin_constants_of(tile, over_rows, 3 if dtype == "bf16" else 1))
            constants |= dict.fromkeys(ones, 1)
            types = dict.fromkeys(_thin_product_kernel.arg_names, "i32") | {"scaling": "fp32", "counters": "*i32"}
            types |= dict.fromkeys(("out", "workspace"), "*fp32")
            types |= {"x": f"*{dtype}", "f": "*fp32" if dtype == "bf16" else f"*{dtype}"}
            kernel = Kernel(
                f"{name} {dtype} {tile.rows}x{tile.depth}x{tile.ranks} thin",
                _thin_product_kernel,
                types,
                constants,
                tile.warps,
                tile.stages,
                options={"enable_fp_fusion": True},
                elements=tile.rows * tile.depth / (WARP * tile.warps),
                tensor_cores=True,
            )
            kernels.append(kernel)
    return kernels


def streaming_kernels(dtype: str = "bf16") -> list[Kernel]:
    """The kernels that read and write each element once: they have no loop, and bytes bound them."""
    exact = {"enable_fp_fusion": False}
    quantize = Kernel(
        f"quantize {dtype}",
        _nf4_quantize_kernel,
        dict.fromkeys(("boundary", "absmax"), "*fp32")
        | {"w": f"*{dtype}", "lowest": "*i32", "codes": "*u8", "n": "i64", "n_bytes": "i64"},
        {"BLOCK": BLOCKSIZE, "ROWS": TILE // BLOCKSIZE},
        *(QUANTIZE_WARPS, 3, exact, TILE / (WARP * QUANTIZE_WARPS)),
    )
    quantize_absmax = Kernel(
        "quantize absmax",
        _quantize_absmax_kernel,
        dict.fromkeys(("absmax", "offset", "thresholds", "nested"), "*fp32") | {"codes": "*u8", "blocks": "i32"},
        {"NESTED": NESTED_BLOCKSIZE, "ROWS": NESTED_ROWS},
        *(QUANTIZE_WARPS, 3, exact, NESTED_BLOCKSIZE * NESTED_ROWS / (WARP * QUANTIZE_WARPS)),
    )
    constants = {"BLOCK": BLOCKSIZE, "NESTED": NESTED_BLOCKSIZE, "DOUBLE": True}
    types = dict.fromkeys(("levels", "nested_absmax", "nested_map", "offset"), "*fp32") | {"absmax": "*u8"}
    if dtype == "fp32":
        tile = TILE_BYTES // 4
        types |= {"out": "*fp32", "codes": "*u8", "n": "i64", "n_bytes": "i64"}
        constants |= {"DTYPE": _DTYPES[dtype], "ROWS": tile // BLOCKSIZE, "COLS": BLOCKSIZE}
        decoding = (_nf4_dequantize_kernel, types, constants, DEQUANTIZE_WARPS)
    else:
        tile = COLUMNS * ROWS
        types |= {"out": f"*{dtype}", "codes": "*u8", "n_rows": "i64"}
        constants |= {"BF16": dtype == "bf16", "ROWS": ROWS, "COLS": COLUMNS}
        decoding = (_nf4_dequantize_pairs_kernel, types, constants, ROWS // WARP)
    dequantize = Kernel(f"dequantize {dtype}", *decoding, 3, exact, tile / (WARP * decoding[-1]))
    numbers = ("beta1", "rest1", "beta2", "rest2", "eps", "decay", "step_size", "bias2_sqrt")
    types = {"table": "*i64", "chunks": "*i32"} | dict.fromkeys(numbers, "fp32")
    maps = dict.fromkeys(("m_map", "m_thresholds", "v_map", "v_thresholds"), "*fp32")
    same = {"PARAM": _DTYPES[dtype], "GRAD": _DTYPES[dtype], "ALIGNED": True}
    adamw = Kernel(
        f"adamw {dtype}",
        _adamw_kernel,
        types,
        {**same, "CHUNK": ADAMW_CHUNK},
        *(ADAMW_WARPS, 3, exact, ADAMW_CHUNK / (WARP * ADAMW_WARPS)),
    )
    adamw_8bit = Kernel(
        f"adamw 8-bit {dtype}",
        _adamw_8bit_kernel,
        types | maps,
        {**same, "CHUNK": CHUNK_8BIT, "BLOCK": STATE_BLOCKSIZE},
        *(ADAMW_WARPS, 3, exact, CHUNK_8BIT / (WARP * ADAMW_WARPS)),
    )
    return [quantize, quantize_absmax, dequantize, adamw, adamw_8bit]

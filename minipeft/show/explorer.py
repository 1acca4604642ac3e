"""One page on which rank, block size and double quantization are moved, and error, bytes and weight are seen.

The weight is kept in NF4, and the best correction of rank r to what NF4 lost stands beside it (LoftQ, Li et al. 2023,
algorithm 1 with one step): W ~ dequantize(quantize(W)) + B A. Everything that the page shows is computed here, by the
library, when the page is written; the page chooses among it, and multiplies out B A for the picture.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minipeft.files import write_text
from minipeft.nf4 import NF4Weight

BLOCKSIZES = (32, 64, 128, 256, 512, 1024)
RANKS = tuple(range(17))
_TEMPLATE = Path(__file__).with_name("explorer.html")


def some_weight(size: int = 96) -> Tensor:
    """A weight (size, size) as trained ones are: normal numbers, directions that stand out, and some outliers."""
    draw = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(size, size, generator=draw)
    W += 0.01 * torch.randn(size, 2, generator=draw) @ torch.randn(2, size, generator=draw)
    places = torch.randint(size * size, (12,), generator=draw)
    W.view(-1)[places] *= 6
    return W


def explored(W: Tensor) -> dict[str, Any]:
    """Everything that the page shows of a float32 weight (rows, columns), as JSON holds it.

    `choices` holds one entry for each of BLOCKSIZES without and with double quantization: `code_bytes`, `scale_bytes`
    (the tables included) and by rank the bytes of A and B in 16 bits (`factor_bytes`), and the relative Frobenius and
    the largest absolute error (`error`, `largest`). Arrays are base64 of little-endian float32, or of uint8 for codes.
    """
    choices = []
    for blocksize in BLOCKSIZES:
        for double in (False, True):
            packed = NF4Weight.quantize(W, blocksize, double)
            lost = (W - packed.dequantize()).double()
            left, values, right = torch.linalg.svd(lost, full_matrices=False)
            most = max(RANKS)
            B, A = (left[:, :most] * values[:most]).float(), right[:most].float()
            errors, largest = [], []
            for rank in RANKS:
                rest = lost - B[:, :rank].double() @ A[:rank].double()
                errors.append(float(rest.norm() / W.double().norm()))
                largest.append(float(rest.abs().max()))
            choices.append(
                {
                    "blocksize": blocksize,
                    "double": double,
                    "codes": _base64(_unpacked(packed)),
                    "scales": _base64(packed.scales().numpy()),
                    "A": _base64(A.numpy()),
                    "B": _base64(B.numpy()),
                    "code_bytes": packed.codes.nbytes,
                    "scale_bytes": packed.nbytes - packed.codes.nbytes,
                    "factor_bytes": [2 * rank * sum(W.shape) for rank in RANKS],
                    "error": errors,
                    "largest": largest,
                }
            )
    levels = packed.quant_map.numpy()
    return {
        "rows": W.shape[0],
        "columns": W.shape[1],
        "weight": _base64(W.numpy()),
        "levels": _base64(levels),
        "ranks": list(RANKS),
        "blocksizes": list(BLOCKSIZES),
        "choices": choices,
    }


def write_explorer(file: Path, W: Tensor | None = None) -> None:
    """Write the page, of `some_weight` unless another is given; it needs no other file and no network."""
    data = json.dumps(explored(some_weight() if W is None else W))
    write_text(file, _TEMPLATE.read_text(encoding="utf-8").replace("DATA_OF_THE_PAGE", data))


def _unpacked(packed: NF4Weight) -> Any:
    codes = packed.codes.flatten().numpy()
    return np.stack([codes >> 4, codes & 15], 1).reshape(-1)[: packed.shape.numel()]


def _base64(values: Any) -> str:
    kind = "u1" if values.dtype == np.uint8 else "<f4"
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode("ascii")

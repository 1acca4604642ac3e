"""Decoding a whole doubly quantized weight, as merging and the large-batch product do it.

Bytes: codes and scales read, the weight written. The floor in torch is a copy of the decoded weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.harness import OURS, Candidate, Case, Run, Work
from benchmarks.peers import BITSANDBYTES, UNSLOTH, Peers, bitsandbytes_state
from benchmarks.reference import decoded, near, packed_weight
from benchmarks.shapes import Sizes, dtype_name
from minipeft.nf4 import NF4Weight

OP = "nf4_dequantize"
# Of the largest weights, some 4 root mean squares: float32's roundings of scale and product, then one to the dtype.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """One case for each layer and dtype."""
    for layer in sizes.layers:
        for dtype in sizes.dtypes:
            weight = packed_weight(layer, dtype, device)
            w = decoded(weight).to(dtype)
            work = Work(weight.nbytes + w.nbytes)
            error, tolerance = near(partial(decoded, weight)), TOLERANCES[dtype]
            candidates = [
                Candidate(OURS, partial(_ours, weight), error, tolerance, work),
                peers.candidate(BITSANDBYTES, partial(_bitsandbytes, weight), error, tolerance, work),
                peers.candidate(UNSLOTH, partial(_unsloth, weight, peers), error, tolerance, work),
                Candidate("torch copy", partial(_copy, w), near(partial(w.double)), 0.0, Work(2 * w.nbytes)),
            ]
            yield Case(OP, "", layer.label, dtype_name(dtype), candidates)


def _ours(weight: NF4Weight) -> Run:
    return lambda: weight.dequantize()


def _bitsandbytes(weight: NF4Weight, bnb: Any) -> Run:
    codes, state = bitsandbytes_state(bnb, weight)
    return lambda: bnb.functional.dequantize_4bit(codes, state)


def _unsloth(weight: NF4Weight, peers: Peers, kernels: Any) -> Run:
    codes, state = bitsandbytes_state(peers.find(BITSANDBYTES), weight)
    return lambda: kernels.fast_dequantize(codes, state)


def _copy(w: torch.Tensor) -> Run:
    return lambda: w.clone()

"""Quantizing a weight to NF4 with double quantization, as loading a model does it.

Bytes: the weight read, codes and scales written. The floor in torch is a copy of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.harness import OURS, Candidate, Case, Run, Work
from benchmarks.peers import BITSANDBYTES, Peers
from benchmarks.reference import near, quantization_error
from benchmarks.shapes import BLOCKSIZE, Sizes, dtype_name
from minipeft.nf4 import NF4Weight
from minipeft_kernels.nf4.codebooks import NF4_LEVELS

OP = "nf4_quantize"
TOLERANCE = 1.0


def cases(device: torch.device, sizes: Sizes, peers: Peers) -> Iterator[Case]:
    """One case for each layer and dtype."""
    for layer in sizes.layers:
        for dtype in sizes.dtypes:
            w = (0.02 * torch.randn(layer.out_features, layer.in_features, device=device)).to(dtype)
            levels = NF4_LEVELS.to(device)
            packed = w.numel() // 2 + w.numel() // BLOCKSIZE
            work = Work(w.nbytes + packed)

            def ours_error(weight: NF4Weight, w: torch.Tensor = w, levels: torch.Tensor = levels) -> float:
                return quantization_error(w.view(-1), levels, BLOCKSIZE, weight.codes, weight.scales())

            def peer_error(result: Any, w: torch.Tensor = w, levels: torch.Tensor = levels) -> float:
                codes, state = result
                return quantization_error(w.view(-1), levels, BLOCKSIZE, codes, _peer_scales(state))

            candidates = [
                Candidate(OURS, partial(_ours, w), ours_error, TOLERANCE, work),
                peers.candidate(BITSANDBYTES, partial(_bitsandbytes, w), peer_error, TOLERANCE, work),
                Candidate("torch copy", partial(_copy, w), near(partial(w.double)), 0.0, Work(2 * w.nbytes)),
            ]
            yield Case(OP, "", layer.label, dtype_name(dtype), candidates)


def _ours(w: torch.Tensor) -> Run:
    return lambda: NF4Weight.quantize(w, BLOCKSIZE, double_quant=True)


def _bitsandbytes(w: torch.Tensor, bnb: Any) -> Run:
    return lambda: bnb.functional.quantize_4bit(w, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")


def _peer_scales(state: Any) -> torch.Tensor:
    nested = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    scales: torch.Tensor = state.state2.code.double()[state.absmax.long()] * nested + state.offset.double()
    return scales


def _copy(w: torch.Tensor) -> Run:
    return lambda: w.clone()

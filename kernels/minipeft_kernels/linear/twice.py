"""The backward of `linear` by operations that have derivatives of their own: for second derivatives alone.

Penalties on gradients, Hessian products and meta-learning differentiate the backward (`create_graph=True`). There
speed matters less than that every term is there: W is decoded whole, and x A^T is computed once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nf4.dequantize import nf4_dequantize
from ..packed import NF4, unflatten
from ..registration import without_autocast


def run_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    low: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    needed: list[bool],
    *flat_weight: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx (..., K), dA and dB for dy (..., N), as `op._run_backward` gives them; None for one that is not needed.

    Raises RuntimeError where a term cannot be had: x is kept for the gradient of A, and B's depends on it, too.
    """
    needs_x, needs_A, needs_B = needed
    rows, weight = dy.reshape(-1, dy.shape[-1]), unflatten(flat_weight)
    dx = dA = dB = back = None
    with without_autocast():
        if lora_A is not None and lora_B is not None:
            wide = rows.to(adapter_dtype)
            back = scaling * wide @ lora_B.to(adapter_dtype)  # (M, r)
            inputs = None if x is None else x.reshape(-1, x.shape[-1]).to(adapter_dtype)
            if needs_A:
                assert inputs is not None
                dA = (back.T @ inputs).to(lora_A.dtype)
            if needs_B:
                if inputs is None and needs_x:
                    raise RuntimeError(
                        "the second derivative of a LoRA layer whose A is frozen wants an input that was not kept: let "
                        "A require gradients, too"
                    )
                kept = low if inputs is None else scaling * inputs @ lora_A.to(adapter_dtype).T
                assert kept is not None
                dB = (wide.T @ kept).to(lora_B.dtype)
        if needs_x:
            if isinstance(weight, NF4):
                dx = rows.to(compute_dtype) @ nf4_dequantize(weight, compute_dtype)
            elif weight is not None:
                dtype = torch.promote_types(rows.dtype, weight.dtype)
                dx = rows.to(dtype) @ weight.to(dtype)
            if back is not None and lora_A is not None:
                update = back @ lora_A.to(adapter_dtype)
                dx = update if dx is None else dx + update
            assert dx is not None
            dx = dx.to(dy.dtype).reshape(*dy.shape[:-1], dx.shape[-1])
    return dx, dA, dB

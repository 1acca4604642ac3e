"""The experts' products on a GPU, all experts in one launch, and the CPU not waiting for how the rows were divided.

NF4 weights are multiplied by the kernels of `linear`, in which a tile of rows looks up whose it is: x is not padded,
experts without rows cost nothing, and LoRA's update starts the sum. Dense weights and the update's small products go to
torch's grouped product. What one of these does not take, `loop` does, which asks for the offsets and so waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import capability
from ..linear.gpu import fused_obstacle, launch
from ..linear.tables import table_on
from ..linear.tiles import fused_max_rows
from . import loop
from .stack import NF4Stack, Stack

# The tensor-map descriptors of torch's grouped product want rows and addresses at multiples of so many bytes.
_ALIGNMENT = 16


def forward(
    x: Tensor,
    offsets: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    weight: Stack | None,
) -> tuple[Tensor, Tensor]:
    """As `loop.forward`."""
    x = x.contiguous()
    if not _is_grouped(x, offsets, compute_dtype, weight):
        return loop.forward(x, offsets, lora_A, lora_B, scaling, compute_dtype, adapter_dtype, weight)
    low, update = x.new_empty(0), None
    if lora_A is not None and lora_B is not None:
        low = _by_expert(x.to(adapter_dtype), lora_A.to(adapter_dtype), offsets).mul_(scaling)
        # The kernel reads B as it lies; of many experts the gathering costs more than a copy of all.
        whole = loop.is_scattered(lora_B) and offsets.shape[0] <= 4 * x.shape[0]
        update = low, lora_B.contiguous() if whole else lora_B
    if isinstance(weight, NF4Stack):
        return launch(x.to(compute_dtype), weight, None, update, grad=False, offsets=offsets).to(x.dtype), low
    y = None if weight is None else _by_expert(x, weight, offsets)
    if update is not None:
        added = _by_expert(low, update[1].to(low.dtype), offsets)
        y = added if y is None else (y + added).to(x.dtype)
    assert y is not None
    return y, low


def backward(
    dy: Tensor,
    offsets: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    low: Tensor | None,
    scaling: float,
    compute_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    needed: list[bool],
    weight: Stack | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `loop.backward`."""
    dy = dy.contiguous()
    if not _is_grouped(dy, offsets, compute_dtype, weight):
        return loop.backward(dy, offsets, x, lora_A, lora_B, low, scaling, compute_dtype, adapter_dtype, needed, weight)
    needs_x, needs_A, needs_B = needed
    dx, dA, dB, update = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0), None
    if lora_A is not None and lora_B is not None:
        wide = dy.to(adapter_dtype)
        if needs_x or needs_A:
            # Over the experts once, and not in every product: in the file they alternate from number to number.
            down = lora_B.to(adapter_dtype).contiguous().transpose(1, 2)
            update = _by_expert(wide, down, offsets).mul_(scaling), lora_A
        if needs_A:
            assert x is not None and update is not None
            dA = _outer(update[0], x.to(adapter_dtype), offsets).to(lora_A.dtype)
        if needs_B:
            assert low is not None
            dB = torch.empty_like(lora_B).copy_(_outer(wide, low, offsets))
    if not needs_x:
        return dx, dA, dB
    if isinstance(weight, NF4Stack):
        dx = launch(dy.to(compute_dtype), weight, None, update, grad=True, offsets=offsets).to(dy.dtype)
        return dx, dA, dB
    total = None if weight is None else _by_expert(dy, weight.transpose(1, 2), offsets)
    if update is not None:
        added = _by_expert(update[0], update[1].to(adapter_dtype).transpose(1, 2), offsets)
        total = added if total is None else total + added
    assert total is not None
    return total.to(dy.dtype), dA, dB


def _is_grouped(rows: Tensor, offsets: Tensor, compute_dtype: torch.dtype, weight: Stack | None) -> bool:
    """True if the product with `weight` runs as one launch.

    Many rows an expert are left to the loop: with them W is better decoded once, an expert at a time.
    """
    experts, count = offsets.shape[0], rows.shape[0]
    if not experts or not count:
        return False
    if not isinstance(weight, NF4Stack):
        return weight is None or _takes_grouped_mm(rows, weight)
    if fused_obstacle(compute_dtype, weight.columns, weight.blocksize, weight.nested_blocksize):
        return False
    limit = fused_max_rows(capability(rows.device), compute_dtype == torch.float32, table_on(rows.device))
    return limit is None or count <= limit * min(experts, count)


def _by_expert(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """rows_e M_e^T of each expert: (S, K) and (experts, N, K) -> (S, N); zeros in the rows of nobody."""
    if _takes_grouped_mm(rows, matrices):
        y = torch.nn.functional.grouped_mm(rows, matrices.transpose(1, 2), offs=offsets)
        # It leaves the rows of nobody as they were in memory.
        somebodys = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
        return y.masked_fill_(~somebodys[:, None], 0)
    y = rows.new_zeros(rows.shape[0], matrices.shape[1])
    for e, start, stop in loop.groups_within(offsets, rows):
        y[start:stop] = rows[start:stop] @ matrices[e].T
    return y


def _outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a_e^T b_e of each expert: (S, P) and (S, Q) -> (experts, P, Q); zeros for an expert without rows."""
    b = b.contiguous()
    if _takes_grouped_mm(a, b):
        return torch.nn.functional.grouped_mm(a.T, b, offs=offsets)
    out = a.new_zeros(offsets.shape[0], a.shape[1], b.shape[1])
    for e, start, stop in loop.groups_within(offsets, a):
        out[e] = a[start:stop].T @ b[start:stop]
    return out


def _takes_grouped_mm(rows: Tensor, other: Tensor) -> bool:
    """True if torch's grouped product multiplies them without asking the CPU for the offsets."""
    return _has_grouped_mm(rows.device) and rows.dtype == other.dtype == torch.bfloat16 and _is_aligned(rows, other)


def _has_grouped_mm(device: torch.device) -> bool:
    """True on NVIDIA GPUs with a torch (2.10) whose grouped product they all have, and not the H100 alone."""
    return device.type == "cuda" and torch.version.hip is None and hasattr(torch.nn.functional, "grouped_mm")


def _is_aligned(*tensors: Tensor) -> bool:
    """True if one of the last two dimensions is contiguous and everything else is at multiples of 16 bytes."""
    for t in tensors:
        *outer, row, column = t.stride()
        if row == 1:
            row = column
        elif column != 1:
            return False
        steps = (t.data_ptr(), *(s * t.element_size() for s in (*outer, row)))
        if any(step % _ALIGNMENT for step in steps):
            return False
    return True

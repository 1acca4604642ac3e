"""The experts one after the other, each by a form of `linear`; experts without rows are not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linear import twice
from ..linear.op import form_for
from ..linear.thin import as_thin_takes, grad_of_A, grad_of_B, project, project_back
from ..packed import Weight, flatten
from .stack import NF4Stack, Stack, unflatten_stack


def groups(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of the experts that have rows. On a GPU this waits for the offsets.

    Raises ValueError for offsets that decrease.
    """
    start = 0
    for e, stop in enumerate(offsets.tolist()):
        if stop < start:
            raise ValueError(f"offsets must not decrease, and that of expert {e} is {stop} after {start}")
        if stop > start:
            yield e, start, stop
        start = stop


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
    """y (S, N), and low (S, r), which is empty without an update; rows of nobody are zeros in both."""
    low = x.new_empty(0)
    if lora_A is not None:
        low = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=adapter_dtype)
    width = _rows_of(weight, lora_B)
    y = x.new_zeros(x.shape[0], width, dtype=adapter_dtype if weight is None else x.dtype)
    chosen = list(groups_within(offsets, x))
    each_B = _each_B(lora_B, [e for e, *_ in chosen])
    for i, (e, start, stop) in enumerate(chosen):
        rows, matrix = x[start:stop], _matrix_of(weight, e)
        update = None
        if lora_A is not None:
            low[start:stop] = project(rows, lora_A[e], scaling, adapter_dtype)
            update = low[start:stop], each_B[i]
        y[start:stop] = form_for(matrix, rows).forward(rows, matrix, None, update, compute_dtype)
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
    """dx (S, K) in dy's dtype, dA and dB; one that is not needed is empty.

    Zeros for the rows of nobody, and for experts without rows.
    """
    needs_x, needs_A, needs_B = needed
    nothing = dy.new_empty(0)
    dx = dy.new_zeros(dy.shape[0], _columns_of(weight, lora_A)) if needs_x else nothing
    dA = torch.zeros_like(lora_A) if needs_A and lora_A is not None else nothing
    # In the strides of B, which is a view of the parameter: so the parameter's gradient is this tensor, not a copy.
    dB = torch.zeros_like(lora_B) if needs_B and lora_B is not None else nothing
    chosen = list(groups_within(offsets, dy))
    owners = [e for e, *_ in chosen]
    each_B = _each_B(lora_B if needs_x or needs_A else None, owners)
    scattered = needs_B and is_scattered(dB)
    made = dB.new_empty(len(chosen), *dB.shape[1:]) if scattered else dB
    for i, (e, start, stop) in enumerate(chosen):
        rows, update = dy[start:stop], None
        if lora_A is not None:
            wide = as_thin_takes(rows, lora_A.shape[1], adapter_dtype)
            if needs_x or needs_A:
                update = project_back(wide, each_B[i], scaling, adapter_dtype), lora_A[e]
            if needs_A:
                assert x is not None and update is not None
                dA[e] = grad_of_A(update[0], x[start:stop], dA.dtype)
            if needs_B:
                assert low is not None
                made[i if scattered else e] = grad_of_B(wide, low[start:stop], dB.dtype)
        if needs_x:
            matrix = _matrix_of(weight, e)
            dx[start:stop] = form_for(matrix, rows).input_gradient(rows, matrix, update, compute_dtype)
    if scattered:
        _put_each(dB, owners, made)
    return dx, dA, dB


def run_backward_twice(
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
    *flat_weight: Any,
) -> tuple[Any, Any, Any]:
    """As `backward`, by operations that have derivatives of their own: for second derivatives alone.

    Raises RuntimeError where a term cannot be had, as `twice.run_backward` says.
    """
    needs_x, needs_A, needs_B = needed
    weight = unflatten_stack(flat_weight)
    dx = dy.new_zeros(dy.shape[0], _columns_of(weight, lora_A)) if needs_x else None
    As: list[Tensor] = [] if lora_A is None else [torch.zeros_like(a) for a in lora_A]
    Bs: list[Tensor] = [] if lora_B is None else [torch.zeros_like(b) for b in lora_B]
    for e, start, stop in groups_within(offsets, dy):
        own = (lora_A[e], lora_B[e], low[start:stop]) if lora_A is not None else (None, None, None)  # type: ignore[index]
        rows = None if x is None else x[start:stop]
        numbers = (scaling, compute_dtype, adapter_dtype, needed)
        dx_e, dA_e, dB_e = twice.run_backward(dy[start:stop], rows, *own, *numbers, *flatten(_matrix_of(weight, e)))
        if dx is not None and dx_e is not None:
            dx = dx.index_put((torch.arange(start, stop, device=dy.device),), dx_e)
        if dA_e is not None:
            As[e] = dA_e
        if dB_e is not None:
            Bs[e] = dB_e
    return dx, torch.stack(As) if needs_A else None, torch.stack(Bs) if needs_B else None


def groups_within(offsets: Tensor, rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """As `groups`. Raises ValueError for an expert that ends beyond the rows, too."""
    for e, start, stop in groups(offsets):
        if stop > rows.shape[0]:
            raise ValueError(f"offsets: expert {e} ends at row {stop}, and there are {rows.shape[0]}")
        yield e, start, stop


def is_scattered(lora_B: Tensor) -> bool:
    """True if the experts alternate in B (experts, N, r) from number to number, as in the parameter of a file.

    There each number of one expert's B takes a cache line of its own, in every product with it.
    """
    experts, _, rank = lora_B.shape
    return experts > 1 and lora_B.stride() == (1, rank * experts, experts)


def _flat(lora_B: Tensor) -> Tensor:
    """A scattered B (experts, N, r) as the matrix (N r, experts) that it is in memory, which torch transposes fast."""
    return lora_B.permute(1, 2, 0).view(-1, lora_B.shape[0])


def _each_B(lora_B: Tensor | None, chosen: list[int]) -> list[Tensor]:
    """B_e (N, r) of each chosen expert: scattered ones gathered, all of them in one way through B."""
    if lora_B is None:
        return []
    if not is_scattered(lora_B):
        return [lora_B[e] for e in chosen]
    columns = _flat(lora_B)
    if len(chosen) < lora_B.shape[0]:
        columns = columns.index_select(1, torch.tensor(chosen, dtype=torch.int64, device=lora_B.device))
    return list(columns.T.contiguous().view(len(chosen), *lora_B.shape[1:]))


def _put_each(dB: Tensor, chosen: list[int], made: Tensor) -> None:
    """The other way: (chosen, N, r) to the places of a scattered dB."""
    columns = made.flatten(1).T
    if len(chosen) < dB.shape[0]:
        _flat(dB).index_copy_(1, torch.tensor(chosen, dtype=torch.int64, device=dB.device), columns)
    else:
        _flat(dB).copy_(columns)


def _matrix_of(weight: Stack | None, e: int) -> Weight | None:
    return None if weight is None else weight.expert(e) if isinstance(weight, NF4Stack) else weight[e]


def _rows_of(weight: Stack | None, lora_B: Tensor | None) -> int:
    if weight is None:
        assert lora_B is not None
        return lora_B.shape[1]
    return weight.rows if isinstance(weight, NF4Stack) else weight.shape[1]


def _columns_of(weight: Stack | None, lora_A: Tensor | None) -> int:
    if weight is None:
        assert lora_A is not None
        return lora_A.shape[2]
    return weight.columns if isinstance(weight, NF4Stack) else weight.shape[2]

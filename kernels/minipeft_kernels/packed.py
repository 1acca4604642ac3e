"""NF4: the tensors and sizes that a 4-bit weight is, named, and how an operation of torch's takes them.

torch.library knows tensors and numbers, no tuples of both: an operation that takes a weight has `SCHEMA` as its last
arguments, is called with `*flatten(weight)`, and calls `unflatten` on what it got.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class NF4(NamedTuple):
    """A matrix of `rows` x `columns` in 4-bit NormalFloat (Dettmers et al. 2023, QLoRA), in row-major order.

    n = rows * columns weights lie in blocks of `blocksize`, `blocks` = ceil(n / blocksize); a block need not end where
    a row does. A weight is quant_map[code] * (scale of its block). The scales are `absmax` itself, or, doubly
    quantized, nested_map[absmax] * nested_absmax + offset, where `nested_blocksize` scales share a nested one.

    Attributes:
        codes: uint8 ((n+1)//2, 1), two weights a byte, the earlier one in the high half.
        absmax: float32 (blocks,), or uint8 (blocks,) when doubly quantized.
        quant_map: float32 (16,), the level that each code stands for.
        nested_absmax: float32 (ceil(blocks / nested_blocksize),), or None.
        nested_map: float32 (256,), or None; on disk and in `NF4Weight` it is called nested_quant_map.
        offset: float32 (), or None.
        rows, columns: out_features and in_features of a linear layer.
        blocksize, nested_blocksize: weights that share a scale, scales that share a nested scale.
    """

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None
    rows: int
    columns: int
    blocksize: int
    nested_blocksize: int = 256

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors, in the order of the fields."""
        return self.codes, self.absmax, self.quant_map, self.nested_absmax, self.nested_map, self.offset


TENSORS = NF4._fields.index("rows")
"""How many of the fields are tensors: the first ones."""

Weight = Tensor | NF4
"""A frozen matrix (out_features, in_features): dense, perhaps a transposed view, or NF4."""

SCHEMA = (
    "Tensor? weight=None, Tensor? absmax=None, Tensor? quant_map=None, Tensor? nested_absmax=None, "
    "Tensor? nested_map=None, Tensor? offset=None, SymInt rows=0, SymInt columns=0, int blocksize=0, "
    "int nested_blocksize=0"
)
"""A `Weight` or None as the last arguments of an operation; `weight` is the dense one, or the codes of an NF4 one."""


def flatten(weight: Weight | None) -> Sequence[Any]:
    """`weight` as arguments of SCHEMA: the ten fields of an NF4, or the dense tensor alone."""
    return weight if isinstance(weight, NF4) else (weight,)


def unflatten(arguments: Sequence[Any]) -> Weight | None:
    """The weight that came as arguments of SCHEMA; torch leaves out those at the end that are at their defaults."""
    weight: Any
    weight, *rest = arguments or (None,)
    return NF4(weight, *rest, *_DEFAULTS[len(rest) :]) if rest and rest[0] is not None else weight


_DEFAULTS = (None,) * (TENSORS - 1) + (0,) * 4

"""A training step without data: a tensor of numbers is a shape, and each storage is counted while it lives.

torch's FakeTensorMode runs a model on tensors that have a shape, a dtype and a device, and no memory. What a program
asks of data is answered here. Integers and masks (token ids, positions, attention masks) are small and kept for real,
so that a model takes the branches that it takes in a run. Of floating values, which are nowhere, the answer is that of
sound ones: none is bad, all are finite, and two are equal where the same operations made them.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Kinds of memory, in the order in which they are shown.
KINDS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")

# Elements of a mask over pairs of positions that is kept for real; by those of (rows, tokens) models choose their way.
_MOST = 1 << 20
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_ANY = (aten.any.default, aten.any.dim, aten.any.dims)


class Ghosts(TorchDispatchMode):
    """Runs operations on fake tensors and counts the bytes of the storages that are alive.

    A storage is counted once, from the operation that made it until its last tensor has gone: views, and what autograd
    keeps for the backward pass, hold it. What an operation needs within itself is not seen.

    Args:
        vocabulary: the last size of the tensors that are counted as logits; None where there are none.

    Attributes:
        live, peak: Bytes by kind, now, and when their sum was the largest.
        phase, peak_phase: What the caller says that it does, now, and at the peak.
        history: (phase, bytes by kind in the order of KINDS) after each operation since `start`.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.live = dict.fromkeys(KINDS, 0)
        self._fake = _Mode(allow_non_fake_inputs=True)
        self._held: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._total = 0
        self.start("")

    def start(self, phase: str) -> None:
        """Forget peak and history so far."""
        self.phase = self.peak_phase = phase
        self.peak, self._most = dict(self.live), self._total
        self.history: list[tuple[str, tuple[int, ...]]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within this, operations make fake tensors and are counted."""
        swap = torch.utils.swap_tensors

        def swap_alone(one: Tensor, other: Tensor) -> None:
            # By a swap nn.Module moves a parameter, which torch refuses while anything refers to it weakly, as does the
            # table of what was made a fake tensor.
            self._fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
            swap(one, other)

        torch.utils.swap_tensors = swap_alone
        try:
            with self._fake, self, warnings.catch_warnings():
                # torch's remarks on tensors that have no data.
                warnings.filterwarnings("ignore", message=".*FakeTensor.*")
                yield
        finally:
            torch.utils.swap_tensors = swap

    def count(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of `tensors` under `kind`, also those that were counted under another."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._forget(storage._cdata)
            self._remember(storage, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it makes."""
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, FakeTensor) for leaf in leaves):
            out = self._run_fake(func, args, kwargs)
        else:
            out = _run_either(func, args, kwargs)
        made = hash((func, *map(_origin, leaves)))
        for number, tensor in enumerate(tree_leaves(out)):
            if isinstance(tensor, Tensor):
                whole = bool(args) and _is_whole_view(tensor, args[0])
                tensor._made = _origin(args[0]) if whole else hash((made, number))  # type: ignore[attr-defined]
                logits = tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
                self._remember(tensor.untyped_storage(), "logits" if logits else "activations")
        self.history.append((self.phase, tuple(self.live.values())))
        return out

    def _run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.equal.default:
            return _origin(args[0]) == _origin(args[1])
        if func is aten._local_scalar_dense.default:
            return not getattr(args[0], "_of_any", False) if args[0].dtype == torch.bool else 1
        if func in _INDEXED:
            # As many elements as a mask has ones, which a fake mask would not tell: their places are given instead.
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        out = func(*args, **kwargs)
        if func in _ANY:
            out._of_any = True
        return out

    def _remember(self, storage: Any, kind: str) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._held:
            return

        def gone(_: Any) -> None:
            self._forget(key)

        self._held[key] = (weakref.ref(storage, gone), kind, nbytes)
        self.live[kind] += nbytes
        self._total += nbytes
        if self._total > self._most:
            self._most, self.peak, self.peak_phase = self._total, dict(self.live), self.phase

    def _forget(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self.live[held[1]] -= held[2]
            self._total -= held[2]


class _Mode(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The mode itself, which its tensors hold: a copy of a tensor is of the same mode."""
        return self


def _run_either(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on real tensors or none: its results are fake, unless they are kept for real."""
    try:
        out = func(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        out = None
    if out is not None and not all(_is_kept(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
        return out
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _is_kept(tensor: Tensor) -> bool:
    """True for scalars, places and masks. uint8 are the codes of weights."""
    small = tensor.ndim <= 2 or tensor.numel() <= _MOST
    return tensor.ndim == 0 or (tensor.dtype in (torch.int64, torch.int32, torch.bool) and small)


def _origin(leaf: Any) -> Any:
    """A value's mark, the same for values that the same operations made: of other tensors, themselves."""
    if isinstance(leaf, Tensor):
        return getattr(leaf, "_made", id(leaf))
    return leaf if isinstance(leaf, int | float | str | bool | torch.dtype | None) else repr(leaf)


def _is_whole_view(tensor: Tensor, other: Any) -> bool:
    """True for another tensor over the same elements of the same storage."""
    if tensor is other or not isinstance(other, Tensor) or tensor.shape != other.shape:
        return False
    same = tensor.untyped_storage()._cdata == other.untyped_storage()._cdata and tensor.stride() == other.stride()
    return same and tensor.storage_offset() == other.storage_offset()


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """An index into one dimension, or for a mask the indices of its ones into each of its dimensions."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)

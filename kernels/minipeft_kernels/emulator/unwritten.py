"""A record of the memory that nobody has written: what `torch.empty` gives has not been, until somebody writes it.

A kernel that reads such memory reads whatever was there. Torch does not say so; but its functions can be watched. While
the mode below is active, what `torch.empty` and its like return counts as unwritten, byte by byte, until a kernel
writes it. Whatever else torch does with such a tensor, but for looking at its shape or cutting it, may write it: then
all of its storage counts as written. So a tensor is never suspected wrongly. What is made inside an operation of
torch's own (`torch.ops.*`) is not seen, and counts as written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CREATE = {
    *(torch.empty, torch.empty_like, torch.empty_strided, torch.empty_permuted),
    *(Tensor.new_empty, Tensor.new_empty_strided),
}
# Methods and functions that neither write their tensor nor read its contents, by name: properties are all `__get__`.
_HARMLESS = {
    *("__get__", "size", "stride", "numel", "nelement", "dim", "ndimension", "element_size", "data_ptr", "__len__"),
    *("is_contiguous", "is_floating_point", "untyped_storage", "storage_offset", "get_device", "__hash__"),
    *("view", "view_as", "reshape", "__getitem__", "expand", "transpose", "t", "permute", "unsqueeze", "squeeze"),
    *("narrow", "flatten", "contiguous", "detach", "__repr__"),
}


class Unwritten(TorchFunctionMode):
    """Active, it remembers which storages hold bytes that nobody has written."""

    def __init__(self) -> None:
        super().__init__()
        # By the storage's address: the tensor that was made, to know that it still lives, and a flag a byte.
        self._known: dict[int, tuple[weakref.ref[Tensor], np.ndarray]] = {}

    def written(self, address: int, size: int) -> np.ndarray | None:
        """The flags of a storage, bool (size,), to be set as bytes are written; None if all of it counts as written."""
        entry = self._known.get(address)
        if entry is None or entry[0]() is None or len(entry[1]) != size:
            return None
        return entry[1]

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _CREATE:
            made = function(*args, **kwargs)
            self._remember(made)
            return made
        if getattr(function, "__name__", "") not in _HARMLESS and self._known:
            for value in (*args, *kwargs.values()):
                self._forget(value)
        return function(*args, **kwargs)

    def _remember(self, made: Tensor) -> None:
        if made.device.type != "cpu" or made.layout != torch.strided or not made.numel():
            return
        storage = made.untyped_storage()
        self._known[storage.data_ptr()] = (weakref.ref(made), np.zeros(storage.nbytes(), np.bool_))

    def _forget(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                self._forget(item)
        elif isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided:
            self._known.pop(value.untyped_storage().data_ptr(), None)

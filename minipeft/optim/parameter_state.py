"""The state of one parameter as torch's optimizers show it: a mapping whose entries lie in pages until they are read.

Code that works on an optimizer takes `optimizer.state[p]["exp_avg"]` for the moment itself: it reads it, changes it in
place (ReLoRA's reset), puts another tensor there, deletes it. Here the moment lies in pages that move, so what is
handed out is a copy, which stands for the entry from then on: the parameter's next update takes over what it holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.optim.pages import Field, Segment
from minipeft.optim.state import PagedState
from minipeft.shards import empty_like, is_sharded, own_part

IN_PAGES: Any = object()  # the value of an entry that nobody has asked for


class ParameterState(MutableMapping[str, Any]):
    """The value of `optimizer.state[p]`: "step", float32 () on the CPU, and the fields of the pages' layout.

    An entry that is read is a tensor in host memory. It is the entry itself for whoever holds it: what is written into
    it counts at the parameter's next update, after which it has the new numbers. While anybody holds it, each update
    costs a copy out of the pages and one into them.

    Of a sharded parameter (DTensor) the pages hold this process's part; an entry is a shard of the same layout.

    Attributes:
        number: the parameter's number in the pages; given back with the last reference to this object.
        owner: the parameter.
        settled_for: the parameter for which every entry lies in the pages; None once an entry was handed out, put in
            another's place or deleted.
        blank: the pages hold nothing but zeros for it.
    """

    def __init__(self, pages: PagedState, owner: Tensor) -> None:
        self.pages, self.owner, self.shape, self.sharded = pages, owner, owner.shape, is_sharded(owner)
        self.elements = own_part(owner).numel()
        self.settled_for: Tensor | None = None
        self._entries: dict[str, Any] = {}
        self._lent: dict[str, weakref.ref[Tensor]] = {}
        self.number, self.blank = pages.add(self.elements)

    def __del__(self) -> None:
        # Not there if the pages could not be had.
        if hasattr(self, "number"):
            self.pages.release(self.number)

    def __getitem__(self, key: str) -> Any:
        value = self._entries[key]
        if value is IN_PAGES:
            value = self._entries[key] = self._read(key)
        self.settled_for = None
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.names:
            raise KeyError(f"{key!r} would not be kept: an entry of PagedAdamW's state is {' or '.join(self.names)}")
        self._entries[key] = value
        self.settled_for = None

    def __delitem__(self, key: str) -> None:
        del self._entries[key]
        self.settled_for = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> Any:
        """A copy or a pickle is a plain dict of copies."""
        return dict, (self.snapshot(),)

    @property
    def names(self) -> list[str]:
        """The entries that a whole state has."""
        return ["step", *(field.name for field in self.pages.table.layout.fields)]

    def copy(self) -> dict[str, Any]:
        """A dict of the entries, not of copies of them, as of a dict."""
        return dict(self)

    def snapshot(self) -> dict[str, Any]:
        """Copies of the entries."""
        return read_states({self: self})[self]

    def outside(self) -> dict[str, Any]:
        """The entries that do not lie in the pages."""
        return {key: value for key, value in self._entries.items() if value is not IN_PAGES}

    def settle(self, owner: Tensor, given: Mapping[str, Any]) -> bool:
        """Every entry lies in the pages now, for `owner`. True if there may be holders of the `given` entries."""
        self.owner, self.shape, self.settled_for = owner, owner.shape, owner
        self._entries = dict.fromkeys(self.names, IN_PAGES)
        self._lent = {key: weakref.ref(value) for key, value in given.items() if isinstance(value, Tensor)}
        self.blank = False
        return bool(self._lent)

    def return_to_holders(self) -> None:
        """After an update: what was handed out and is still held has the new numbers, and stands for the entry."""
        for key, reference in self._lent.items():
            held = reference()
            if held is not None and self._entries.get(key) is IN_PAGES:
                self._entries[key] = held.copy_(self._read(key))
                self.settled_for = None
        self._lent = {}

    def _read(self, key: str) -> Tensor:
        if key == "step":
            return torch.tensor(float(self.pages.steps[self.number]), dtype=torch.float32, device="cpu")
        return self.read(next(field for field in self.pages.table.layout.fields if field.name == key))

    def read(self, field: Field) -> Tensor:
        """A copy, in host memory, of an entry that lies in the pages."""
        result = self.empty_entry(field)
        index, own = self.pages.table.layout.fields.index(field), own_part(result)
        for segments in self.pages.sweep([self.number]):
            for segment, views in segments:
                part(field, own, segment).copy_(views[index])
        return result

    def empty_entry(self, field: Field) -> Tensor:
        """A tensor in host memory for a copy of an entry, its values not set."""
        if self.sharded:
            return empty_like(self.owner, field.dtype)
        return torch.empty(field_shape(field, self.shape), dtype=field.dtype, device="cpu")

    def fits(self, p: Tensor) -> bool:
        """True if these pages have the room and the layout of the state of `p`."""
        alike = self.shape == p.shape and self.sharded == is_sharded(p)
        return alike and (not self.sharded or self.elements == own_part(p).numel())

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        # Entries are tensors, which compare element by element.
        return self is other


def field_shape(field: Field, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a field of a parameter of `shape`."""
    if field.per == 1:
        return tuple(shape)
    return (field.count(torch.Size(shape).numel()),)


def part(field: Field, whole: Tensor, segment: Segment) -> Tensor:
    """The entries of a field that belong to a segment, of the field's entries for all of the parameter."""
    return whole.reshape(-1)[segment.start // field.per : field.count(segment.stop)]


def read_states(states: Mapping[Any, ParameterState]) -> dict[Any, dict[str, Any]]:
    """Copies of all entries, in host memory; those of one optimizer in one sweep."""
    copies: dict[Any, dict[str, Any]] = {}
    by_pages: dict[PagedState, dict[int, dict[str, Any]]] = {}
    for key, state in states.items():
        outside, fields = state.outside(), {field.name: field for field in state.pages.table.layout.fields}
        copies[key] = {}
        for name in state:
            if name in outside:
                value = outside[name]
                copies[key][name] = value.detach().clone() if isinstance(value, Tensor) else value
            elif name == "step":
                copies[key][name] = torch.tensor(float(state.pages.steps[state.number]), dtype=torch.float32)
            else:
                copies[key][name] = state.empty_entry(fields[name])
                wanted = by_pages.setdefault(state.pages, {}).setdefault(state.number, {})
                wanted[name] = own_part(copies[key][name])
    for pages, numbers in by_pages.items():
        for segments in pages.sweep(numbers):
            for segment, views in segments:
                for field, view in zip(pages.table.layout.fields, views, strict=True):
                    if field.name in numbers[segment.parameter]:
                        part(field, numbers[segment.parameter][field.name], segment).copy_(view)
    return copies

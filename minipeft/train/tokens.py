"""Tokenized documents in four bytes a token: in memory while they are few, in a file that has no name beyond that.

A token that is learned is kept as its id, one that is not as the id's complement, which is negative. Full pieces are
written to a temporary file (in TMPDIR) and mapped from there, so that data may be larger than memory.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

# Tokens of a piece that is kept in memory until it is full: 64 MB.
PIECE = 1 << 24


class TokenStore(Sequence[Any]):
    """A sequence of examples, built anew at each access from the tokens that are kept.

    Args:
        make: builds one from its token ids and labels, two lists of whole numbers.
        ignore: the label of a token that is not learned.
    """

    def __init__(self, make: Callable[[list[int], list[int]], Any], ignore: int) -> None:
        self._make, self._ignore = make, ignore
        self._pieces: list[Any] = []
        self._open = array("i")
        # Of each document its piece, its first token there and its length; and which documents this sequence has.
        self._at: tuple[array[int], array[int], array[int]] = (array("q"), array("q"), array("q"))
        self._order: array[int] | None = None

    def append(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        """Add a document; its labels are its ids or `ignore`."""
        if len(self._open) + len(ids) > PIECE and self._open:
            self._pieces.append(_on_disk(self._open))
            self._open = array("i")
        for values, value in zip(self._at, (len(self._pieces), len(self._open), len(ids)), strict=True):
            values.append(value)
        marked = (id if label == id else ~id for id, label in zip(ids, labels, strict=True))
        self._open.extend(marked)

    def select(self, indices: Iterable[int]) -> TokenStore:
        """The documents at `indices`, in that order, over the same tokens."""
        chosen = TokenStore(self._make, self._ignore)
        chosen._pieces, chosen._open, chosen._at = self._pieces, self._open, self._at
        chosen._order = array("q", (self._document(index) for index in indices))
        return chosen

    def lengths(self) -> list[int]:
        """The tokens of each document."""
        return [self._at[2][self._document(index)] for index in range(len(self))]

    def marked(self) -> Iterator[np.ndarray]:
        """Each document's tokens, int32, as they are kept."""
        return (self._tokens(index) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._at[0] if self._order is None else self._order)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        tokens = self._tokens(index % len(self))
        ids = np.where(tokens < 0, ~tokens, tokens)
        return self._make(ids.tolist(), np.where(tokens < 0, self._ignore, tokens).tolist())

    def _document(self, index: int) -> int:
        return index if self._order is None else self._order[index]

    def _tokens(self, index: int) -> np.ndarray:
        piece, start, length = (values[self._document(index)] for values in self._at)
        if piece < len(self._pieces):
            return np.asarray(self._pieces[piece][start : start + length])
        return np.array(self._open[start : start + length], dtype=np.int32)


def _on_disk(tokens: array[int]) -> np.ndarray:
    """The tokens in a file without a name, mapped; its space is free once nobody holds them."""
    with tempfile.TemporaryFile() as file:
        tokens.tofile(file)
        file.flush()
        return np.memmap(file, dtype=np.int32, mode="r")

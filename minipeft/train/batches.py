"""From examples to batches of tensors, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minipeft.train.encoding import IGNORE, Example
from minipeft.train.packing import pack_lengths


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass, with counts taken before anything is on a device.

    Attributes:
        inputs: keyword arguments of the model, int64 (B, T).
        labels: int64 (B, T), -100 where nothing is learned.
        tokens: real tokens, padding not counted.
        loss_tokens: labels that take part in the loss.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    tokens: int
    loss_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.tokens, self.loss_tokens)


class Batches:
    """A data set cut into batches. A row is one example, or with `packing` several.

    Iterating gives every row once, longest first (for evaluation, where order is nothing); `epoch(n)` gives those of
    training epoch n, shuffled. `len()` is the number of batches of one pass.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        pad_id: int = 0,
        packing: bool = False,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or greater, got {batch_size}")
        if packing and max_length is None:
            raise ValueError("packing needs max_length, the tokens a row holds")
        self.examples = examples
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.packing = packing
        self.seed = seed
        lengths = [len(example) for example in examples]
        self.rows = pack_lengths(lengths, max_length or 0) if packing else [[i] for i in range(len(lengths))]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Rows of like length together: least padding.
        by_length = sorted(range(len(self.rows)), key=lambda row: -self._row_length(row))
        return self._batches(by_length)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of training epoch `epoch`, from batch `start` on."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._batches(order[start * self.batch_size :].tolist())

    def _row_length(self, row: int) -> int:
        return sum(len(self.examples[i]) for i in self.rows[row])

    def _batches(self, order: Sequence[int]) -> Iterator[Batch]:
        for at in range(0, len(order), self.batch_size):
            rows = [[self.examples[i] for i in self.rows[row]] for row in order[at : at + self.batch_size]]
            yield collate_packed(rows, self.pad_id) if self.packing else collate(_firsts(rows), self.pad_id)


def _firsts(rows: Sequence[Sequence[Example]]) -> list[Example]:
    return [row[0] for row in rows]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right.

    Inputs are input_ids and attention_mask, (B, T) with T the longest example.
    """
    width = max(map(len, examples))
    shape = (len(examples), width)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example)] = torch.tensor(example.input_ids)
        labels[row, : len(example)] = torch.tensor(example.labels)
        attention_mask[row, : len(example)] = 1
    return _batch({"input_ids": input_ids, "attention_mask": attention_mask}, labels, examples)


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Put each row's documents one after the other; padding becomes a document of its own.

    A document's first token is never a label: what precedes it belongs to another document.

    Inputs are input_ids and position_ids, (B, T). There is no attention mask: transformers reads the
    documents off the position ids only when it gets none.
    """
    width = max(sum(map(len, row)) for row in rows)
    shape = (len(rows), width)
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    for row, row_documents in enumerate(rows):
        at = 0
        for document in row_documents:
            end = at + len(document)
            input_ids[row, at:end] = torch.tensor(document.input_ids)
            labels[row, at + 1 : end] = torch.tensor(document.labels[1:], dtype=torch.int64)
            position_ids[row, at:end] = torch.arange(end - at)
            at = end
        position_ids[row, at:] = torch.arange(width - at)
    documents = [document for row in rows for document in row]
    return _batch({"input_ids": input_ids, "position_ids": position_ids}, labels, documents)


def _batch(inputs: dict[str, torch.Tensor], labels: torch.Tensor, examples: Sequence[Example]) -> Batch:
    return Batch(inputs, labels, sum(map(len, examples)), sum(e.loss_tokens for e in examples))


def pad_id_of(tokenizer: object) -> int:
    """The id to pad with: the tokenizer's, else its end token, else 0. Padding is masked, so any id will do."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0

"""From examples to batches of tensors, in an order that depends on (seed, epoch) alone; packed rows on request.

A packed row holds several documents, isolated from one another. Isolation is transformers' own: given no attention
mask, no cache, and position ids that restart at 0 for every document, its models attend within a document only. Two
ways to lose it in silence were measured with transformers 5.23: `use_cache=True` in eval mode (every model), and models
that ignore position ids when they build the mask (OPT). So the loop always passes `use_cache=False`, and
`check_isolation` tries the very model before training.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from minipeft.train.encoding import IGNORE, Example, lengths
from minipeft.train.errors import ConfigError


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

    Iterating gives every row once, longest first (for evaluation, where the order does not matter); `epoch(n)` gives
    the batches of training epoch n, shuffled. `len()` is the number of batches of one pass.

    Args:
        batch_size: rows in a batch; the last batch may have fewer.
        max_length: with `packing`, the tokens that a row holds.
        seed: with the epoch's number it decides the order.

    Raises:
        ValueError: batch_size below 1, packing without max_length, or with packing an example longer than a row.
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
        self.lengths = lengths(examples)
        self.rows = pack_lengths(self.lengths, max_length or 0) if packing else [[i] for i in range(len(examples))]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Rows of similar length share a batch, which needs the least padding.
        by_length = sorted(range(len(self.rows)), key=lambda row: -self._row_length(row))
        return self._batches(by_length)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of training epoch `epoch`, from batch `start` on."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self._batches(order[start * self.batch_size :].tolist())

    def _row_length(self, row: int) -> int:
        return sum(self.lengths[i] for i in self.rows[row])

    def _batches(self, order: Sequence[int]) -> Iterator[Batch]:
        for at in range(0, len(order), self.batch_size):
            rows = [[self.examples[i] for i in self.rows[row]] for row in order[at : at + self.batch_size]]
            yield collate_packed(rows, self.pad_id) if self.packing else collate([row[0] for row in rows], self.pad_id)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right.

    Inputs are input_ids and attention_mask, (B, T) with T the longest example.
    """
    input_ids = _padded([example.input_ids for example in examples], pad_id)
    attention_mask = _padded([[1] * len(example) for example in examples], 0)
    labels = _padded([example.labels for example in examples], IGNORE)
    return _batch({"input_ids": input_ids, "attention_mask": attention_mask}, labels, examples)


def collate_packed(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Put each row's documents one after the other; padding becomes a document of its own.

    A document's first token is never a label: the token before it belongs to another document.

    Inputs are input_ids and position_ids, (B, T). There is no attention mask: transformers reads the
    documents off the position ids only when it gets none.
    """
    width = max(sum(map(len, row)) for row in rows)
    lengths = [[*map(len, row), width - sum(map(len, row))] for row in rows]
    input_ids = _padded([[token for document in row for token in document.input_ids] for row in rows], pad_id)
    labels = _padded([[label for doc in row for label in (IGNORE, *doc.labels[1:])] for row in rows], IGNORE)
    position_ids = _padded([[at for length in row for at in range(length)] for row in lengths], 0)
    documents = [document for row in rows for document in row]
    return _batch({"input_ids": input_ids, "position_ids": position_ids}, labels, documents)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """The rows as int64 (B, T), filled up on the right with `value`."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _batch(inputs: dict[str, torch.Tensor], labels: torch.Tensor, examples: Sequence[Example]) -> Batch:
    return Batch(inputs, labels, sum(map(len, examples)), sum(e.loss_tokens for e in examples))


def pad_id_of(tokenizer: object) -> int:
    """The id to pad with: the tokenizer's, else its end token, else 0. Padding is masked, so any id will do."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into rows of `capacity`: best fit, longest first. Deterministic; every item exactly once.

    Returns:
        Rows of item indices.

    Raises:
        ValueError: an item is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    # (free tokens, row), sorted: a bisection finds the row with the least room that fits.
    free: list[tuple[int, int]] = []
    for item in order:
        size = lengths[item]
        if size > capacity:
            raise ValueError(f"document {item} has {size} tokens, more than a row holds ({capacity})")
        at = bisect.bisect_left(free, (size, -1))
        if at == len(free):
            rows.append([item])
            bisect.insort(free, (capacity - size, len(rows) - 1))
        else:
            room, row = free.pop(at)
            rows[row].append(item)
            bisect.insort(free, (room - size, row))
    return rows


@torch.no_grad()
def check_isolation(model: Any, tolerance: float = 0.02) -> None:
    """Try on the model itself that packed documents do not see each other.

    Two rows differ only in their first document; the logits of the second must not differ. Dropout and other
    training-only behaviour are switched off for the test.

    Raises:
        ConfigError: they differ, so this model cannot train on packed rows.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(12, device=device) * 7 + 3) % vocabulary
    other = ids.clone()
    other[:6] = (other[:6] + 1) % vocabulary
    positions = torch.arange(6, device=device).repeat(2, 2)  # (2, 12): 0..5 0..5
    was_training = model.training
    model.eval()
    try:
        inputs = {"input_ids": torch.stack([ids, other]), "position_ids": positions, "use_cache": False}
        logits = model(**inputs).logits.float()[:, -6:]
    finally:
        model.train(was_training)
    spread = logits.std().item()
    leak = (logits[0] - logits[1]).abs().max().item()
    if not leak <= tolerance * spread:
        name = type(model).__name__
        raise ConfigError(f"packing: {name} lets packed documents see each other: set packing: false")

"""The task of a comparison: texts to train on, texts held out, and a text of another kind.

Forgetting shows on a text that has nothing to do with the task. Unless the user gives one, it is a part of the
Constitution of the United States, which comes with the package and which any language model has met.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minipeft.compare.plan import Shared
from minipeft.demo.data import labels_of, load_demo_data
from minipeft.files import write_text
from minipeft.train.encoding import EncodedDataset, Example, encode_prompt, encode_record, encode_records
from minipeft.train.errors import ConfigError, DataError
from minipeft.train.records import Record, read_jsonl, read_records, write_records

# Rows of the demo's snippets. Of a user's file all records are used, and a fifth of them is held out.
TRAIN_ROWS, HELD_OUT_ROWS = 1000, 400

# Tokens of a piece of the other text; each piece is measured by itself.
WINDOW = 128

FILES = ("train.jsonl", "held_out.jsonl", "other.txt")


@dataclasses.dataclass(frozen=True)
class Task:
    """The texts of a comparison, those to learn from and those to measure on.

    Attributes:
        labels: the answers to choose from; empty where the answers are free text, which is measured by perplexity.
        other: a text of another kind than the records.
        about: a sentence on the records, and one on the other text.
    """

    train: list[Record]
    held_out: list[Record]
    labels: tuple[str, ...]
    other: str
    about: str

    def write(self, folder: Path) -> None:
        """Write the three files that the runs read."""
        write_records(folder / FILES[0], self.train)
        write_records(folder / FILES[1], self.held_out)
        write_text(folder / FILES[2], self.other)


def load_task(
    data: str | None, eval_data: str | None, other_text: str | None, say: Callable[[str], None] = print
) -> Task:
    """The demo's snippets, or the user's records.

    Args:
        eval_data: place of held-out records; without one a fifth of `data`, at most 400, is held out.
        other_text: UTF-8 text file.

    Raises:
        DataError, AssetError: something cannot be read or fetched, is too little, or does not go together.
    """
    other, about_other = _other_text(other_text)
    if data is None:
        if eval_data is not None:
            raise ConfigError("--eval-data goes with --data: the demo's texts have held-out ones of their own")
        demo = load_demo_data(None, TRAIN_ROWS, HELD_OUT_ROWS, 0, say)
        return Task(demo.train, demo.held_out, demo.labels, other, f"{demo.about}\n{about_other}")
    records = read_records(data)
    if eval_data is None:
        train, held_out = _split(records, data)
        labels = _labels(records)
    else:
        train, held_out = records, read_records(eval_data)
        labels = _labels(train)
        _check_kinds(train, held_out, labels)
    if len(held_out) < 2:
        raise DataError("expected at least two held-out records: with one there is no spread", eval_data or data)
    kept = {_text(record) for record in train}
    if all(_text(record) in kept for record in held_out):
        raise DataError("every held-out record is also a training record: nothing is held out", eval_data or data)
    source = f"{data}, held out: {eval_data}" if eval_data else f"{data}, a part of it held out"
    return Task(train, held_out, labels, other, f"Records of {source}.\n{about_other}")


def _split(records: Sequence[Record], path: str) -> tuple[list[Record], list[Record]]:
    """The different records, shuffled: those to train on, and a fifth held out."""
    different = list({_text(record): record for record in records}.values())
    held = min(HELD_OUT_ROWS, len(different) // 5)
    if held < 2:
        message = f"{len(different)} different records are too few to hold a fifth out"
        raise DataError(f"{message}: give at least 10, or held-out records by --eval-data", path)
    random.Random(0).shuffle(different)
    return different[held:], different[:held]


def _labels(records: Sequence[Record]) -> tuple[str, ...]:
    """The answers to choose from, if there are few and each comes again and again; else none."""
    labels = labels_of(records)
    return labels if len(records) >= 2 * len(labels) else ()


def _check_kinds(train: Sequence[Record], held_out: Sequence[Record], labels: tuple[str, ...]) -> None:
    kinds = {_kind(record) for record in train}
    for record in held_out:
        if _kind(record) not in kinds:
            expected = " or ".join(sorted(kinds))
            raise record.error(f"expected a record of the training data's kind, {expected}, found {_kind(record)}")
        if labels and record.completion not in labels:
            raise record.error(
                f"completion {record.completion!r} is none of the training data's: {', '.join(map(repr, labels))}"
            )


def _kind(record: Record) -> str:
    if record.messages is not None:
        return '{"messages"}'
    return '{"text"}' if record.text is not None else '{"prompt", "completion"}'


def _text(record: Record) -> str:
    return json.dumps([record.text, record.prompt, record.completion, record.messages], default=dict)


def _other_text(path: str | None) -> tuple[str, str]:
    if path is None:
        text = (importlib.resources.files("minipeft.compare") / "constitution.txt").read_text(encoding="utf-8")
        return text, "Other text: preamble and articles II, III, V and VI of the Constitution of the United States."
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the other text: {error.strerror or error}", path) from None
    except UnicodeDecodeError:
        raise DataError("the other text is not UTF-8", path) from None
    if not text.strip():
        raise DataError("the other text is empty", path)
    return text, f"Other text: {path}."


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A task in tokens.

    Attributes:
        windows: the other text, cut into pieces that are read one by one.
    """

    train: EncodedDataset
    held_out: EncodedDataset
    windows: list[Example]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(len(example) for part in (self.train, self.held_out) for example in part.examples)


def encode_task(task: Task, tokenizer: Any, shared: Shared) -> Encoded:
    """Tokenize everything.

    Raises:
        DataError: a record of more than `shared.max_length` tokens, or another text of fewer than four.
    """
    advice = "raise --max-length, or leave longer texts out by --too-long drop"
    train, held_out = (
        encode_records(part, tokenizer, shared.max_length, advice=advice) for part in (task.train, task.held_out)
    )
    return Encoded(train, held_out, windows_of(encode_prompt(tokenizer, task.other), shared.window))


def windows_of(ids: list[int], width: int) -> list[Example]:
    """Consecutive pieces of `width` tokens, at least two; a single token that is left over is left out.

    Raises:
        DataError: fewer than four tokens.
    """
    width = min(width, len(ids) // 2)
    if width < 2:
        raise DataError(f"the other text has {len(ids)} tokens, at least 4 are needed")
    pieces = [ids[at : at + width] for at in range(0, len(ids), width)]
    return [Example(piece, list(piece)) for piece in pieces if len(piece) > 1]


def without_long(task: Task, tokenizer: Any, max_length: int) -> Task:
    """The task without the records of more than `max_length` tokens.

    Raises:
        DataError: none are left to learn from, or fewer than two to measure on.
    """
    parts = []
    for records, what, least in ((task.train, "to learn from", 1), (task.held_out, "held out", 2)):
        lengths = [len(encode_record(record, tokenizer)) for record in records]
        kept = [record for record, length in zip(records, lengths, strict=True) if length <= max_length]
        if len(kept) < least:
            message = f"of the {len(records)} texts {what} {len(kept)} have at most max_length ({max_length}) tokens"
            need = sorted(lengths)[least - 1]
            raise DataError(f"{message}, and {least} must: raise --max-length, to {need} at least", records[0].path)
        parts.append(kept)
    return dataclasses.replace(task, train=parts[0], held_out=parts[1])


def read_task(folder: Path, labels: Sequence[str]) -> Task:
    """The task as `Task.write` left it."""
    train, held_out = (read_jsonl(folder / name) for name in FILES[:2])
    return Task(train, held_out, tuple(labels), (folder / FILES[2]).read_text(encoding="utf-8"), "")


def task_hashes(task: Task) -> dict[str, str]:
    """sha256 of each part."""
    parts = ([*map(_text, task.train)], [*map(_text, task.held_out)], [task.other])
    return {
        name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in zip(FILES, parts, strict=True)
    }

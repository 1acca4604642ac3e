"""What the demo learns from: the rated snippets, or a JSONL file of the user's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minipeft.demo.assets import RATED_SNIPPETS, fetch
from minipeft.demo.task_sentiment import LABELS, make_task, prompt, read_snippets
from minipeft.files import write_text
from minipeft.train.errors import DataError
from minipeft.train.records import Record, make_records, read_jsonl

# With more different completions than this they are taken for free text, not for labels.
MOST_LABELS = 10


@dataclass(frozen=True)
class DemoData:
    """Records to train on and records held out.

    Attributes:
        labels: the completions there are, when there are few: the model is then also asked to choose one.
        about: one or two sentences on the task.
        example: a prompt to try the trained model with; it is not in `train`.
    """

    train: list[Record]
    held_out: list[Record]
    labels: tuple[str, ...]
    about: str
    example: str

    def write(self, directory: Path) -> None:
        """Write `train.jsonl` and `held_out.jsonl`, as `minipeft train` and `minipeft eval` read them."""
        write_records(directory / "train.jsonl", self.train)
        write_records(directory / "held_out.jsonl", self.held_out)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a JSONL file that `records.read_jsonl` reads."""
    lines = [json.dumps(_as_object(record), ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def load_demo_data(
    path: str | None, train_rows: int, held_out_rows: int, seed: int, say: Callable[[str], None] = print
) -> DemoData:
    """The rated snippets, or the records of a JSONL file.

    Args:
        path: the JSONL file, or None.
        train_rows, held_out_rows: at most. Of a file with fewer records, a fifth is held out.

    Raises:
        DataError, AssetError: the data cannot be read or fetched, or is too little.
    """
    if path is None:
        return sentiment_data(fetch(RATED_SNIPPETS, say), train_rows, held_out_rows, seed)
    return own_data(path, train_rows, held_out_rows, seed)


def sentiment_data(folder: Path, train_rows: int, held_out_rows: int, seed: int) -> DemoData:
    """The task of `task_sentiment`, from the folder that holds the snippets."""
    task = make_task(read_snippets(folder), train_rows, held_out_rows, seed)
    return DemoData(
        train=make_records([snippet.record() for snippet in task.train]),
        held_out=make_records([snippet.record() for snippet in task.held_out]),
        labels=tuple(f" {label}" for label in LABELS),
        about="Does a snippet of a review, an editorial or a tweet sound terrible, bad, neutral, good or great?\n"
        "The answers are mean ratings of 20 people (Hutto and Gilbert 2014), every label equally often.",
        example=prompt("I would watch it again tomorrow."),
    )


def own_data(path: str, train_rows: int, held_out_rows: int, seed: int) -> DemoData:
    """A user's records, repeated ones taken once, shuffled and split."""
    records = list({_key(record): record for record in read_jsonl(path)}.values())
    if len(records) < 2:
        raise DataError("expected at least two different records, one to train on and one held out", path)
    random.Random(seed).shuffle(records)
    held = min(held_out_rows, max(1, len(records) // 5))
    train, held_out = records[held : held + train_rows], records[:held]
    example = next((record.prompt for record in held_out if record.prompt is not None), "...")
    return DemoData(train, held_out, labels_of([*train, *held_out]), f"Records of {path}.", example)


def labels_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The different completions where they are few enough to choose from, else none."""
    completions = {record.completion for record in records}
    labels = sorted(completion for completion in completions if completion is not None)
    few = 2 <= len(labels) <= MOST_LABELS and None not in completions
    # A label that another one begins with can never lose to it, so there is no choosing.
    clear = not any(a != b and b.startswith(a) for a in labels for b in labels)
    return tuple(labels) if few and clear else ()


def _key(record: Record) -> str:
    return json.dumps(_as_object(record), sort_keys=True)


def _as_object(record: Record) -> dict[str, object]:
    if record.messages is not None:
        return {"messages": [dict(message) for message in record.messages]}
    if record.text is not None:
        return {"text": record.text}
    return {"prompt": record.prompt, "completion": record.completion}

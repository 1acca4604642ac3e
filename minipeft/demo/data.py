"""The texts that the demo learns from: rated snippets, or records of the user's.

The demo's task: how good or bad does a snippet of text sound, in five words from terrible to great? The snippets come
from movie reviews, product reviews, editorials and tweets, each with the mean of 20 human ratings from -4 to 4 (Hutto
and Gilbert 2014). A small model asked without training answers "good" nearly always.
"""

from __future__ import annotations

import html
import json
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minipeft.demo.assets import RATED_SNIPPETS, fetch
from minipeft.train.errors import DataError
from minipeft.train.records import Record, as_object, make_records, read_records, write_records

# With more different completions than this, the completions are taken for free text, not for labels.
MOST_LABELS = 10

LABELS = ("terrible", "bad", "neutral", "good", "great")

# Ratings below -2 are terrible, below -0.5 bad, below 0.5 neutral, below 2 good, the rest great.
BOUNDS = (-2.0, -0.5, 0.5, 2.0)

# Characters. Short snippets make many rows in a minute of CPU time.
MIN_LENGTH, MAX_LENGTH = 30, 80

# Texts that share this much of their words (Jaccard index) count as the same text.
SAME_TEXT = 0.6


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


def load_demo_data(
    path: str | None, train_rows: int, held_out_rows: int, seed: int, say: Callable[[str], None] = print
) -> DemoData:
    """The rated snippets, or the user's records.

    Args:
        path: their place (see `train/sources.py`), or None.
        train_rows, held_out_rows: at most. Of a file with fewer records, a fifth is held out.

    Raises:
        DataError, AssetError: the data cannot be read or fetched, or is too little.
    """
    if path is None:
        return sentiment_data(fetch(RATED_SNIPPETS, say), train_rows, held_out_rows, seed)
    return own_data(path, train_rows, held_out_rows, seed)


def sentiment_data(folder: Path, train_rows: int, held_out_rows: int, seed: int) -> DemoData:
    """The task of rating snippets, from the folder that holds them; see `make_task`."""
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
    """A user's records, repeated ones taken once, shuffled and split.

    Raises:
        DataError: the file cannot be read, or holds fewer than two different records.
    """
    records = list({_key(record): record for record in read_records(path)}.values())
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
    # A label that is the beginning of another is never less likely than it, so they cannot be told apart.
    clear = not any(a != b and b.startswith(a) for a in labels for b in labels)
    return tuple(labels) if few and clear else ()


def _key(record: Record) -> str:
    return json.dumps(as_object(record), sort_keys=True)


@dataclass(frozen=True)
class Snippet:
    """One rated text; `document` names the review or article that it was cut from."""

    text: str
    rating: float
    document: str

    @property
    def label(self) -> str:
        """The word for the rating."""
        return LABELS[bisect_right(BOUNDS, self.rating)]

    def record(self) -> dict[str, str]:
        """The snippet as a training record; its completion is the label."""
        return {"prompt": prompt(self.text), "completion": f" {self.label}"}


@dataclass(frozen=True)
class Task:
    """Snippets to train on and snippets held out, every label equally often in each part."""

    train: list[Snippet]
    held_out: list[Snippet]


def prompt(text: str) -> str:
    """The prompt for a snippet, which the model continues with a label."""
    return f"{text} Sentiment:"


def read_snippets(folder: Path) -> list[Snippet]:
    """All `*.tsv` files of a folder: id, rating and text, tab-separated; spaces and HTML entities cleaned.

    Raises:
        DataError: a line that is not of this form, or no line at all.
    """
    snippets = [snippet for path in sorted(folder.glob("*.tsv")) for snippet in _read(path)]
    if not snippets:
        raise DataError("found no rated snippets (*.tsv)", folder)
    return snippets


def _read(path: Path) -> Iterable[Snippet]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            identifier, rating, text = line.rstrip("\r").split("\t")
            # Editorials and product reviews are numbered document_sentence, the others by document.
            document = f"{path.stem}/{identifier.split('_')[0]}"
            yield Snippet(" ".join(html.unescape(text).split()), float(rating), document)
        except ValueError:
            raise DataError("expected id, rating and text, separated by tabs", path, number) from None


def make_task(snippets: Sequence[Snippet], train_rows: int, held_out_rows: int, seed: int) -> Task:
    """Choose rows for training and for measuring.

    No document gives rows to both parts, and no training text is nearly the same as another text of the task.

    Args:
        train_rows: rows to train on, at most; rounded down to the same number of every label.
        held_out_rows: rows to measure on, likewise.

    Raises:
        DataError: too few snippets for one row of each label in each part.
    """
    documents: dict[str, list[Snippet]] = {}
    for snippet in snippets:
        documents.setdefault(snippet.document, []).append(snippet)
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    seen = _SeenTexts()
    held_out, used = _fill([documents[name] for name in order], held_out_rows // len(LABELS), seen)
    train, _ = _fill([documents[name] for name in order[used:]], train_rows // len(LABELS), seen)
    if not held_out or not train:
        raise DataError(f"{len(snippets)} snippets are too few: every label needs a row to train on and one held out")
    return Task(train, held_out)


def _fill(documents: Sequence[Sequence[Snippet]], per_label: int, seen: _SeenTexts) -> tuple[list[Snippet], int]:
    """Up to `per_label` rows of each label, equally many, and how many documents they were taken from."""
    chosen: dict[str, list[Snippet]] = {label: [] for label in LABELS}
    used = 0
    for snippets in documents:
        if all(len(rows) >= per_label for rows in chosen.values()):
            break
        used += 1
        for snippet in snippets:
            rows = chosen[snippet.label]
            fits = MIN_LENGTH <= len(snippet.text) <= MAX_LENGTH
            if fits and len(rows) < per_label and seen.is_new(snippet.text):
                rows.append(snippet)
    fewest = min(len(rows) for rows in chosen.values())
    # Interleaved, so that every part of the list is as balanced as the whole.
    return [rows[i] for i in range(fewest) for rows in chosen.values()], used


class _SeenTexts:
    """The texts chosen so far, by their words."""

    def __init__(self) -> None:
        self._texts: list[frozenset[str]] = []
        self._by_word: dict[str, list[int]] = {}

    def is_new(self, text: str) -> bool:
        """True if no text so far is nearly the same; then `text` is remembered."""
        words = frozenset(re.findall(r"\w+", text.lower()))
        shared: dict[int, int] = {}
        for word in words:
            for index in self._by_word.get(word, ()):
                shared[index] = shared.get(index, 0) + 1
        if any(n / len(words | self._texts[i]) >= SAME_TEXT for i, n in shared.items()) or not words:
            return False
        for word in words:
            self._by_word.setdefault(word, []).append(len(self._texts))
        self._texts.append(words)
        return True

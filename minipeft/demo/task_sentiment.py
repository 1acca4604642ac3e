"""The demo's task: how good or bad does a snippet of text sound, in five words from terrible to great?

The data are snippets of movie reviews, product reviews, editorials and tweets, each with the mean of 20 human
ratings from -4 to 4 (Hutto and Gilbert 2014). A small model asked without training answers "good" nearly always.
"""

from __future__ import annotations

import html
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minipeft.train.errors import DataError

LABELS = ("terrible", "bad", "neutral", "good", "great")

# Ratings below -2 are terrible, below -0.5 bad, below 0.5 neutral, below 2 good, the rest great.
BOUNDS = (-2.0, -0.5, 0.5, 2.0)

# Characters. Short snippets make many rows in a minute of CPU time.
MIN_LENGTH, MAX_LENGTH = 30, 80

# Texts that share this much of their words (Jaccard index) count as the same text.
SAME_TEXT = 0.6


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
    """What the model is asked to continue with a label."""
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
    """Texts by their words; `is_new` remembers the text it is asked about and refuses near copies."""

    def __init__(self) -> None:
        self._texts: list[frozenset[str]] = []
        self._by_word: dict[str, list[int]] = {}

    def is_new(self, text: str) -> bool:
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

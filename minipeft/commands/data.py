"""`minipeft data`: how records become tokens: what is learned, how long they are, what is cut, which rows are worst."""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minipeft.train.errors import DataError

# Lines of a histogram, and the characters of its longest bar.
_BINS, _BAR = 12, 40
# Tokens of a record that are shown.
_SHOWN = 400
_GREEN, _DIM, _RED, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True, order=True)
class Row:
    """A record's numbers; the worse it is, the smaller: refused, too long, not seen whole, little learned.

    Attributes:
        kind: 0 refused, 1 longer than the longest, 2 with a message that the template leaves out, 3 none of these.
        measure: of its kind, the smaller the worse.
        place: the file and row.
    """

    kind: int
    measure: float
    number: int
    place: str
    about: str


class Survey:
    """Numbers on all records, gathered one by one."""

    def __init__(self, max_length: int, worst: int) -> None:
        self.max_length, self._worst = max_length, worst
        self.records = self.tokens = self.learned = 0
        self.kinds = [0, 0, 0, 0]
        self.lengths = array("q")
        self._heap: list[tuple[int, float, int, Row]] = []

    def add(self, row: Row, tokens: int = 0, learned: int = 0) -> None:
        """Take in one record, of so many tokens."""
        self.records += 1
        self.kinds[row.kind] += 1
        self.tokens += tokens
        self.learned += learned
        if row.kind:
            self.lengths.append(tokens)
        # The least bad of the worst lies on top, to be given up for a worse one.
        entry = (-row.kind, -row.measure, -row.number, row)
        if len(self._heap) < self._worst:
            heapq.heappush(self._heap, entry)
        elif self._worst:
            heapq.heappushpop(self._heap, entry)

    def worst(self) -> list[Row]:
        """The worst records, the very worst first."""
        return sorted(entry[-1] for entry in self._heap)


def data(args: argparse.Namespace) -> None:
    """`minipeft data`: show records as a model sees them.

    Raises:
        DataError: after the report, records that cannot be trained on; at once, data that cannot be read.
        ModelLoadError, ConfigError: a model without tokenizer, a length that it cannot take.
    """
    from minipeft.train import load_tokenizer, resolve_max_length
    from minipeft.train.encoding import encode_record
    from minipeft.train.models import text_positions
    from minipeft.train.records import check
    from minipeft.train.sources import objects, shares

    tokenizer = load_tokenizer(args.model, args.chat_template)
    survey = Survey(resolve_max_length(args.max_length, *text_positions(args.model, None)), args.worst)
    colored = args.color == "always" or (args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    rows = (row for source, _ in shares(args.data) for row in objects(source))
    shown = 0
    for number, (path, line, value) in enumerate(rows, 1):
        place = f"{path}:{line}"
        try:
            example = encode_record(check(value, path, line), tokenizer)
        except DataError as error:
            survey.add(Row(0, number, number, place, str(error).removeprefix(f"{place}: ")))
            continue
        row = _judged(example, number, place, survey.max_length)
        survey.add(row, len(example), example.loss_tokens)
        if shown < args.show:
            shown += 1
            print(f"--- {place}: {len(example)} tokens, {example.loss_tokens} learned")
            print("".join(_shown(example, tokenizer, survey.max_length, colored)) + "\n")
    if not survey.records:
        raise DataError("the data set is empty", args.data)
    print("\n".join(_report(survey, args.too_long)))
    unusable = survey.kinds[0] + (survey.kinds[1] if args.too_long == "error" else 0)
    if unusable:
        raise DataError(f"{unusable} of {survey.records} records cannot be trained on; the worst are named above")


def _judged(example: Any, number: int, place: str, max_length: int) -> Row:
    tokens, learned = len(example), example.loss_tokens
    if tokens > max_length:
        about = f"{tokens:,} tokens, {tokens - max_length:,} more than {max_length:,}"
        if not any(label >= 0 for label in example.labels[1:max_length]):
            about += ", and all that is learned lies behind them"
        return Row(1, max_length - tokens, number, place, about)
    if example.left_out is not None:
        about = f"the chat template does not write the words of role {example.left_out!r} as they are"
        return Row(2, number, number, place, about)
    return Row(3, learned, number, place, f"{learned:,} of {tokens:,} tokens learned")


def _shown(example: Any, tokenizer: Any, max_length: int, colored: bool) -> Iterator[str]:
    """The first tokens of a record: learned ones green or between >>> and <<<, cut ones red or in [cut: ...]."""
    marks = {"learned": (">>>", "<<<"), "read": ("", ""), "cut": ("[cut: ", "]")}
    if colored:
        marks = {"learned": (_GREEN, _PLAIN), "read": (_DIM, _PLAIN), "cut": (_RED, _PLAIN)}
    kinds = [
        "cut" if at >= max_length else "learned" if label >= 0 else "read"
        for at, label in enumerate(example.labels[:_SHOWN])
    ]
    for kind, group in itertools.groupby(zip(kinds, example.input_ids, strict=False), key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in group])
        before, after = marks[kind]
        yield before + printable(text) + after
    if len(example) > _SHOWN:
        yield f" ... and {len(example) - _SHOWN:,} tokens more"


def printable(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def _report(survey: Survey, too_long: str) -> Iterator[str]:
    refused, long, silent, _ = survey.kinds
    yield f"{survey.records:,} records, {survey.tokens:,} tokens, of which {survey.learned:,} are learned"
    if refused:
        yield f"  {refused:,} cannot be read"
    if long:
        done = {"error": "are refused (--too-long)", "drop": "are left out", "truncate": "are cut"}[too_long]
        yield f"  {long:,} with more than {survey.max_length:,} tokens {done}"
    if silent:
        yield f"  {silent:,} have a message that the chat template does not write as it is"
    if survey.lengths:
        yield "lengths in tokens"
        yield from histogram(survey.lengths)
    rows = survey.worst()
    if rows:
        yield f"the worst {len(rows)}"
        width = max(len(row.place) for row in rows)
        yield from (f"  {row.place:<{width}}  {printable(row.about)}" for row in rows)


def histogram(values: array[int]) -> Iterator[str]:
    """A line for each of up to twelve ranges of equal width, from 1 on: the range, a bar, a count."""
    most = max(values)
    width = next(step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power * _BINS >= most)
    counts = [0] * -(-most // width)
    for value in values:
        counts[max(0, value - 1) // width] += 1
    ends = [f"{at * width + 1:,} to {(at + 1) * width:,}" for at in range(len(counts))]
    for end, count in zip(ends, counts, strict=True):
        bar = "#" * max(count > 0, round(_BAR * count / max(counts)))
        yield f"  {end:>{max(map(len, ends))}}  {bar:<{_BAR}} {count:,}".rstrip()

"""Runs the lessons, and compares what their cells print with the outputs that stand in them.

    python docs/lessons/run.py 06          runs lesson 6, and writes the outputs of its cells into it
    python docs/lessons/run.py --check     runs all lessons, and fails where an output differs

A cell is a block ```python, and what it prints stands in a block ```output behind it. Pictures are drawn and not kept.
Training amplifies the last bit of each sum, which another processor rounds otherwise: numbers that follow from a
trained model have the comment <!-- trained --> above their block, and are compared with more room.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import linecache
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LESSONS = sorted(FOLDER.glob("[0-9][0-9]-*.md"))


@dataclass(frozen=True)
class Room:
    """The room that numbers have: relative, in units of their last digit, and in points for percentages."""

    relative: float
    digits: float
    points: float


COMPUTED = Room(relative=0.02, digits=1.01, points=1.01)
# Seen between AVX-512 and no vector instructions at all: a loss of 1.4 became 1.0, one of 0.003 became 0.001.
TRAINED = Room(relative=0.5, digits=4.01, points=12)

_CELL = re.compile(
    r"(?P<cell>^```python\n(?P<code>.*?)^```\n)(?P<gap>\n)?"
    r"(?P<output>(?P<kind>^<!-- trained -->\n)?^```output\n(?P<text>.*?)^```\n)?",
    re.M | re.S,
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")


@dataclass
class Cell:
    """A block of Python.

    Attributes:
        line: its first line in the lesson. expected: the output that stands behind it. room: that its numbers have.
        printed: by the last run.
    """

    line: int
    code: str
    expected: str
    room: Room = COMPUTED
    printed: str = ""

    def difference(self) -> str | None:
        """The first line in which what was printed is not what is expected, None if none is."""
        return difference(self.expected, self.printed, self.room)


@dataclass
class Lesson:
    """A lesson that can be run.

    Attributes:
        session: the names that its cells have made. pictures: how many it has shown.
    """

    path: Path
    session: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    pictures: int = 0

    def cells(self) -> list[Cell]:
        """All blocks of Python, in their order."""
        text = self.path.read_text()
        found = []
        for m in _CELL.finditer(text):
            line = text.count("\n", 0, m.start("code")) + 1
            found.append(Cell(line, m["code"], m["text"] or "", TRAINED if m["kind"] else COMPUTED))
        return found

    def run(self) -> list[Cell]:
        """Run the cells, in the lessons' folder and with pictures that nobody sees."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        def show() -> None:
            for number in plt.get_fignums():
                assert any(axes.has_data() for axes in plt.figure(number).axes), "an empty picture"
                plt.gcf().canvas.draw()
                self.pictures += 1
            plt.close("all")

        before, plt.show = plt.show, show  # type: ignore[assignment]
        cells = self.cells()
        try:
            with _in_folder():
                for cell in cells:
                    self._run_cell(cell)
        finally:
            plt.show = before
            plt.close("all")
        return cells

    def _run_cell(self, cell: Cell) -> None:
        # So that inspect finds the source of what a cell defines, which Triton asks for.
        name = f"{self.path.name}, line {cell.line}"
        linecache.cache[name] = (len(cell.code), None, cell.code.splitlines(keepends=True), name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(cell.code, name, "exec"), self.session)
        cell.printed = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())

    def write(self, cells: list[Cell]) -> None:
        """Put what the cells printed in the place of the outputs that stand there."""
        left = iter(cells)

        def filled(match: re.Match[str]) -> str:
            printed = next(left).printed
            if not printed:
                return match["cell"] + ("\n" if match["gap"] and not match["output"] else "")
            end = "\n" if match["gap"] and not match["output"] else ""
            return f"{match['cell']}\n{match['kind'] or ''}```output\n{printed}```\n{end}"

        self.path.write_text(_CELL.sub(filled, self.path.read_text()))


@contextlib.contextmanager
def _in_folder() -> Any:
    before = os.getcwd()
    os.chdir(FOLDER)
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        os.chdir(before)


def difference(expected: str, printed: str, room: Room = COMPUTED) -> str | None:
    """The first line in which two outputs differ, None if none does.

    Numbers with a point, and percentages, may differ by `room`. All else, counts too, is compared as it stands.
    """
    for a, b in itertools.zip_longest(expected.splitlines(), printed.splitlines(), fillvalue=""):
        words = [" ".join(_NUMBER.sub("#", line).split()) for line in (a, b)]
        numbers = zip(*(_NUMBER.findall(line) for line in (a, b)), strict=False)
        if words[0] != words[1] or not all(_near(one, other, room) for one, other in numbers):
            return f"expected {a!r}, got {b!r}"
    return None


def _near(expected: str, printed: str, room: Room) -> bool:
    a, b = (float(number.replace(",", "").rstrip("%")) for number in (expected, printed))
    if expected.endswith("%"):
        return abs(a - b) <= room.points
    digits = re.search(r"\.(\d+)", expected)
    if digits is None and "e" not in expected:
        return a == b
    last = 10.0 ** (int(expected.partition("e")[2] or 0) - len(digits[1] if digits else ""))
    return math.isclose(a, b, rel_tol=room.relative, abs_tol=room.digits * last)


def main(arguments: list[str]) -> int:
    """Run the lessons whose numbers are given, or all; write their outputs, or with --check compare."""
    warnings.simplefilter("error")
    wrong = 0
    numbers = tuple(a for a in arguments if a != "--check")
    for path in (p for p in LESSONS if not numbers or p.name.startswith(numbers)):
        lesson = Lesson(path)
        cells = lesson.run()
        if "--check" not in arguments:
            lesson.write(cells)
            continue
        for cell in cells:
            if (found := cell.difference()) is not None:
                print(f"{path.name}, line {cell.line}: {found}")
                wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

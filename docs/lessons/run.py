"""Runs the lessons, and compares what their cells print with the outputs that stand in them.

    python docs/lessons/run.py 06          runs lesson 6, and writes the outputs of its cells into it
    python docs/lessons/run.py --check     runs all lessons, and fails where an output differs

A cell is a block ```python, and what it prints stands in a block ```output behind it. Pictures are drawn and not kept.
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

# Relative, and of percentages in points: models that are trained on another processor end a little elsewhere.
TOLERANCE, POINTS = 0.05, 3

_CELL = re.compile(
    r"(?P<cell>^```python\n(?P<code>.*?)^```\n)(?P<gap>\n)?(?P<output>^```output\n(?P<text>.*?)^```\n)?", re.M | re.S
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")


@dataclass
class Cell:
    """A block of Python. `line`: its first line in the lesson. expected: the output that stands behind it."""

    line: int
    code: str
    expected: str
    printed: str = ""


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
        return [
            Cell(text.count("\n", 0, m.start("code")) + 1, m["code"], m["text"] or "") for m in _CELL.finditer(text)
        ]

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
            return f"{match['cell']}\n```output\n{printed}```\n{end}"

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


def difference(expected: str, printed: str) -> str | None:
    """The first line in which two outputs differ, None if none does.

    Numbers with a point may differ by TOLERANCE or by their last digit, percentages by POINTS. All else, counts too, is
    compared as it stands.
    """
    for a, b in itertools.zip_longest(expected.splitlines(), printed.splitlines(), fillvalue=""):
        words = [" ".join(_NUMBER.sub("#", line).split()) for line in (a, b)]
        numbers = [_NUMBER.findall(line) for line in (a, b)]
        if words[0] != words[1] or not all(map(_near, *numbers)):
            return f"expected {a!r}, got {b!r}"
    return None


def _near(expected: str, printed: str) -> bool:
    a, b = (float(number.replace(",", "").rstrip("%")) for number in (expected, printed))
    if expected.endswith("%"):
        return abs(a - b) <= POINTS
    digits = re.search(r"\.(\d+)", expected)
    if digits is None and "e" not in expected:
        return a == b
    last = 10.0 ** (int(expected.partition("e")[2] or 0) - len(digits[1] if digits else ""))
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1.01 * last)


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
            if (found := difference(cell.expected, cell.printed)) is not None:
                print(f"{path.name}, line {cell.line}: {found}")
                wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

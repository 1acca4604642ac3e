"""The course in docs/lessons: every lesson runs, prints what stands in it, and its exercises know right from wrong."""

import os
import re
import sys
from pathlib import Path

import pytest
from processes import run_process
from wrong_answers import WRONG

ROOT = Path(__file__).parent.parent.parent
LESSONS = ROOT / "docs" / "lessons"
sys.path.insert(0, str(LESSONS))

from run import TRAINED, Lesson, difference  # noqa: E402 - where the lessons are

# What Triton compiles, its interpreter cannot be asked for: this lesson runs in a process of its own.
COMPILED = "08-triton"
# The version whose machine code it shows: another one may choose other instructions.
TRITON = "3.9"


@pytest.mark.parametrize("name", [name for name in WRONG if name != COMPILED])
def test_a_lesson_prints_what_stands_in_it_and_its_exercises_know_right_from_wrong(name: str) -> None:
    check_lesson(name)


def test_the_lesson_that_compiles_does_so_too() -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith(TRITON):
        pytest.skip(f"the lesson shows machine code of Triton {TRITON}, and this is {triton.__version__}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MINIPEFT_", "PYTEST_"))}
    environment |= {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    code = f"import test_lessons; test_lessons.check_lesson({COMPILED!r})"
    run_process([sys.executable, "-c", code], env=environment, check=True)


def check_lesson(name: str) -> None:
    """Run a lesson; raises AssertionError where it is not as it should be."""
    lesson = Lesson(LESSONS / f"{name}.md")
    differences = [
        f"{name}.md, line {cell.line}: {found}" for cell in lesson.run() if (found := cell.difference()) is not None
    ]
    assert not differences, "\n".join([*differences, f"python docs/lessons/run.py {name} writes what it prints now"])
    assert lesson.pictures >= 1
    for number, wrong in enumerate(WRONG[name], 1):
        check = lesson.session[f"check_{number}"]
        check(lesson.session[f"answer_{number}"])
        assert wrong
        for answer in wrong:
            with pytest.raises(AssertionError) as refused:
                check(eval(answer, lesson.session))
            message = str(refused.value).split("\n")[0]
            assert len(message.split()) >= 4, f"{name}, exercise {number}: {answer} is refused without a reason"


def test_every_lesson_is_in_the_index_and_has_its_parts() -> None:
    index = (LESSONS / "README.md").read_text()
    names = [path.stem for path in sorted(LESSONS.glob("[0-9][0-9]-*.md"))]
    assert names == list(WRONG)
    assert re.findall(r"\]\((\d\d-[\w-]+)\.md\)", index) == names
    for name in names:
        text = (LESSONS / f"{name}.md").read_text()
        assert "At the end you can" in text and text.count("<summary>Answer</summary>") == 3
        assert "\n    " in text.partition("```python")[2], f"{name} has no equation"


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("3 tensors", "4 tensors"),
        ("loss 0.52", "loss 0.58"),
        ("1,024 bytes", "1,032 bytes"),
        ("a b", "a c"),
        ("one line\nand another", "one line"),
        ("-1.25", "1.25"),
        ("1.0e-05", "1.0e-04"),
        ("61% right", "64% right"),
    ],
)
def test_an_output_that_differs_is_found(expected: str, printed: str) -> None:
    assert difference(expected, printed)
    assert difference(expected, expected) is None
    assert difference("loss 0.52, 3 tensors", "loss  0.53, 3 tensors") is None


def test_numbers_of_a_trained_model_have_more_room_and_counts_none() -> None:
    assert difference("loss 1.4, 61% right, 8 steps", "loss 1.0, 66% right, 8 steps", TRAINED) is None
    for other in ("loss 0.5, 61% right, 8 steps", "loss 1.4, 80% right, 8 steps", "loss 1.4, 61% right, 9 steps"):
        assert difference("loss 1.4, 61% right, 8 steps", other, TRAINED)

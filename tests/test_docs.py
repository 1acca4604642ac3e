"""The Python in the documentation runs, from top to bottom, and what it asserts holds."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_experts import experts_classes

import minipeft

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_the_lesson_about_lora_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "lora.md").read_text(), re.DOTALL)
    assert len(blocks) > 8
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    session: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/lora.md, block {number}", "exec"), session)


def test_the_lesson_about_lora_names_every_kind_of_combination() -> None:
    from minipeft.lora.combine import KINDS

    text = (DOCS / "lora.md").read_text()
    assert all(f"`{kind}`" in text for kind in KINDS)


def test_the_table_of_memory_is_what_its_code_computes() -> None:
    text = (DOCS / "distributed.md").read_text()
    block = re.findall(r"```python\n(def gigabytes.*?)```", text, re.DOTALL)[0]
    session: dict[str, Any] = {}
    exec(block, session)
    rows = {
        name: [float(size) for size in re.findall(r"([\d.]+) GB", sizes)]
        for name, sizes in re.findall(r"^\| (\S+) \|((?: [\d.]+ GB \|){4})$", text, re.M)
    }
    assert rows == session["table"] and len(rows) == 3


def test_names_of_minipeft_in_the_lessons_exist() -> None:
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"\bminipeft\.(\w+)\(", page.read_text()):
            assert hasattr(minipeft, name), f"{page.name}: minipeft.{name}"


def test_the_page_about_experts_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "experts.md").read_text(), re.DOTALL)
    assert len(blocks) > 5
    session: dict[str, Any] = {"__name__": "experts"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/experts.md, block {number}", "exec"), session)


def test_the_page_about_experts_counts_the_classes() -> None:
    text = (DOCS / "experts.md").read_text()
    assert f"`use_experts_implementation`), {len(experts_classes())} in 5.23" in " ".join(text.split())

"""The README's reading list: the core is as small as it says, and so is the rest."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MOST_LINES, FILES = 3500, range(15, 25)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def reading_list() -> list[Path]:
    return [ROOT / name for name in re.findall(r"^\d+\. \[`([^`]+)`\]", README, re.MULTILINE)]


def stated(what: str) -> int:
    """The number that the README gives for `what`, as in "3,400 lines of core"."""
    found = re.search(rf"([\d,]+) lines\s+{what}", README)
    assert found, what
    return int(found[1].replace(",", ""))


def test_the_core_is_read_in_an_afternoon() -> None:
    files = reading_list()
    assert len(files) in FILES and len(set(files)) == len(files)
    assert sum(map(lines_of, files)) <= MOST_LINES


def test_the_sizes_in_the_readme_are_those_of_the_files() -> None:
    core = sum(map(lines_of, reading_list()))
    sources = [
        *(ROOT / "minipeft").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.[ch]"),
    ]
    rest = sum(map(lines_of, sources)) - core
    assert abs(stated("of core") - core) < 100
    assert abs(stated("around it") - rest) < 1000


def test_the_readme_is_a_front_door() -> None:
    assert len(README.splitlines()) <= 150


def test_links_in_the_pages_lead_somewhere() -> None:
    dead = []
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*/README.md"),
    ]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            if "://" not in link and not (page.parent / link).exists():
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    assert not dead

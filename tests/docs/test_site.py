"""The site of `minipeft docs`: every page is in it, it is whole, and it asks no other machine for anything."""

import importlib.util
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ok, refused

from minipeft.commands import docs

ROOT = Path(__file__).parent.parent.parent
GENERATOR = all(importlib.util.find_spec(name) for name in docs.NEEDED)


def pages(nav: Any) -> Iterator[str]:
    """The pages that a part of the navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(part)


def test_the_navigation_names_every_page() -> None:
    named = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("benchmarks/*.md")]
    expected = {path.relative_to(ROOT).as_posix() for path in there}
    assert len(named) == len(set(named))
    assert set(named) == {*expected, "docs/lessons/README.md", "lessons", "docs/api.md", "docs/explorer.html"}


def test_the_api_names_what_is_public() -> None:
    names = re.findall(r"^::: (\S+)$", docs.api_page(), re.M)
    assert len(names) == len(set(names)) > 60
    assert {"minipeft.lora.config.LoraConfig", "minipeft.model.get_peft_model"} <= set(names)
    assert {"minipeft.optim.paged_adamw.PagedAdamW", "minipeft.nf4.linear.NF4Linear"} <= set(names)


def test_a_lesson_is_made_readable() -> None:
    text = "---\njupytext: {}\n---\n\n# 1\n\n```output\n3\n```\n<details>\n"
    assert docs.readable(text) == '\n# 1\n\n```text\n3\n```\n<details markdown="1">\n'


@pytest.mark.skipif(GENERATOR, reason="the generator is installed")
def test_without_the_generator_it_says_how_to_install_it() -> None:
    assert "pip install -e '.[docs]'" in refused("docs", "--build-only")


@pytest.mark.skipif(not GENERATOR, reason="needs pip install -e '.[docs]'")
def test_folders_that_are_no_site_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert "holds no site" in refused("docs", "--build-only", "--output", tmp_path)


class Assets(HTMLParser):
    """The addresses that a browser fetches when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect them."""
        found = dict(attrs)
        fetched = [found.get(name) for name in ("src", "srcset", "poster", "data")]
        if tag == "link" and found.get("rel") != "canonical":
            fetched.append(found.get("href"))
        self.fetched += [address for address in fetched if address]


@pytest.mark.skipif(not GENERATOR, reason="needs pip install -e '.[docs]'")
def test_the_site_is_whole_and_stands_alone(tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert "warning" not in ok("docs", "--build-only", "--recorded", "--output", site)
    for page in site.rglob("*.html"):
        parser = Assets()
        parser.feed(page.read_text())
        assert not [address for address in parser.fetched if re.match(r"(https?:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text()), style
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert any("principal angles" in entry["text"] for entry in found)
    assert "settings_for" in (site / "docs" / "api.html").read_text()


@pytest.mark.skipif(not GENERATOR, reason="needs pip install -e '.[docs]'")
def test_a_lesson_is_shown_with_what_it_prints_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()\nprint(6 * 7)"
    text = f"# 1\n\n```python\n{code}\n```\n\n```output\n41\n```\n"
    shown = docs.executed(text, "lesson")
    assert "```text\n42\n```" in shown and "\n41\n" not in shown and "data:image/png;base64," in shown
    assert docs.executed(text, "lesson") == shown
    with pytest.raises(docs.ConfigError, match="ZeroDivisionError"):
        docs.executed("```python\n1 / 0\n```\n", "lesson")

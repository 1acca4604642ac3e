"""`minipeft docs`: the pages of this repository as a site, with the lessons run, built by MkDocs and served here.

Nothing in the site is fetched from another machine, neither when it is built nor when it is read.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import importlib.util
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minipeft
from minipeft import public
from minipeft.commands.arguments import check_output_path
from minipeft.commands.show import check_page
from minipeft.demo.assets import cache_dir
from minipeft.files import write_text
from minipeft.train.errors import ConfigError, MissingExtraError, OutputDirError

ROOT = Path(minipeft.__file__).parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers", "jupytext", "nbclient", "ipykernel")
SOMETHING_WRONG = 1
# What the pages link to, beside one another.
COPIED = ("*.md", "docs", "benchmarks", "kernels", "minipeft", "tests")
# Rooms whose public names have pages of the API, beside those of `minipeft` itself.
ROOMS = ("minipeft.nf4", "minipeft.optim", "minipeft.train", "minipeft.kernels")
_OUTPUT = re.compile(r"^```output\n.*?^```\n", re.M | re.S)


def docs(args: argparse.Namespace) -> int:
    """`minipeft docs`: build the site, and serve it on this machine until Ctrl-C.

    Returns the exit code: 1 where something is wrong with the pages, such as a link to nothing, which is told.

    Raises:
        MissingExtraError: the generator is not installed.
        ConfigError: minipeft was installed without its repository; a lesson that fails.
        OutputDirError: a folder that is not a site, or cannot be made; a page that cannot be written.
    """
    if args.explorer is not None:
        check_page(args.explorer)
        _explorer(Path(args.explorer))
        print(f"page          {args.explorer}")
        return 0
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"the site needs {', '.join(missing)}: pip install -e '.[docs]'")
    if not (ROOT / "mkdocs.yml").is_file():
        raise ConfigError(f"the site is made from minipeft's repository, and there is no mkdocs.yml in {ROOT}")
    output = Path(args.output)
    check_output_path(output, may_exist=True)
    if output.is_dir() and any(output.iterdir()) and not (output / "sitemap.xml").is_file():
        raise OutputDirError(f"output directory {output} is not empty, and holds no site that could be replaced")
    problems = build(output, run=not args.recorded)
    for problem in problems:
        print(f"warning       {problem}")
    print(f"site          {output / 'index.html'}")
    if args.build_only:
        return SOMETHING_WRONG if problems else 0
    handler = functools.partial(_Handler, directory=str(output))
    with http.server.ThreadingHTTPServer(("127.0.0.1", args.port), handler) as server:
        print(f"served at     http://127.0.0.1:{server.server_port}/ until Ctrl-C", flush=True)
        server.serve_forever()
    return 0


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are not told."""


def build(output: Path, run: bool = True) -> list[str]:
    """Build the site into `output`, in the place of what is there; sentences on what is wrong with the pages.

    Args:
        run: run the lessons, and show what they print and draw. Those that did not change are taken from the cache.
            False shows what their files say that they print.

    Raises:
        ConfigError: a lesson that fails, or settings of MkDocs that are wrong.
    """
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config
    from mkdocs.exceptions import MkDocsException

    with tempfile.TemporaryDirectory(prefix="minipeft-docs-") as folder:
        pages = Path(folder)
        copy_pages(pages)
        write_text(pages / "docs" / "api.md", api_page())
        _explorer(pages / "docs" / "explorer.html")
        lessons = sorted((pages / "docs" / "lessons").glob("[0-9][0-9]-*.md"))
        for lesson in lessons:
            text = executed(lesson.read_text(encoding="utf-8"), lesson.name) if run else lesson.read_text()
            write_text(lesson, readable(text))
        said = _Warnings(logging.WARNING)
        logging.getLogger("mkdocs").addHandler(said)
        try:
            config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(output.resolve()))
            names = [lesson.relative_to(pages).as_posix() for lesson in lessons]
            config["nav"] = [
                {title: [p for part in parts for p in (names if part == "lessons" else [part])]}
                if isinstance(parts, list)
                else {title: parts}
                for section in config["nav"]
                for title, parts in section.items()
            ]
            build_site(config)
        except MkDocsException as error:
            raise ConfigError(f"the site could not be built: {error}") from error
        finally:
            logging.getLogger("mkdocs").removeHandler(said)
    return said.texts


class _Warnings(logging.Handler):
    """Keeps what MkDocs says that is wrong with the pages."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.texts.append(record.getMessage())


def _explorer(file: Path) -> None:
    from minipeft.show.explorer import write_explorer  # which needs torch

    write_explorer(file)


def copy_pages(folder: Path) -> None:
    """Copy all pages, and the files that they link to, as they lie in the repository."""
    for pattern in COPIED:
        for source in ROOT.glob(pattern):
            if source.is_dir():
                shutil.copytree(source, folder / source.name, ignore=_left_out)
            else:
                shutil.copy(source, folder)


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Names of what is neither text nor picture."""
    shown = (".md", ".py", ".png", ".csv", ".json", ".txt")
    return [name for name in names if not (name.endswith(shown) or (Path(folder) / name).is_dir()) or name[0] in "._"]


def api_page() -> str:
    """Markdown of the API: for each public name a block that mkdocstrings fills from its docstring."""
    lines = ["# API", "", "Every public name, from its docstring. Those of PEFT take PEFT's arguments.", ""]
    seen: set[str] = set()
    for title, names in _public_names():
        lines += [f"## {title}", ""]
        for name in names:
            if name not in seen:
                seen.add(name)
                lines += [f"::: {name}", ""]
    return "\n".join(lines)


def _public_names() -> Iterator[tuple[str, list[str]]]:
    for room in ("minipeft", *ROOMS):
        module = importlib.import_module(room)
        names = public.HOMES if room == "minipeft" else getattr(module, "__all__", ())
        found = ((name, getattr(module, name)) for name in sorted(names))
        # Under their full names, as these are where the source is read. What is no class or function has no docstring.
        full = [
            f"{value.__module__}.{value.__qualname__}"
            for _, value in found
            if callable(value) and getattr(value, "__module__", "").startswith("minipeft") and value.__doc__
        ]
        yield room, full


def executed(text: str, name: str) -> str:
    """A lesson with what its cells print and draw, as Markdown; from the cache where neither it nor the code changed.

    Raises:
        ConfigError: a cell that fails.
    """
    kept = cache_dir() / "docs" / f"{_fingerprint(text)}.md"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    import jupytext
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = jupytext.reads(_OUTPUT.sub("", text), fmt="md")
    print(f"running       {name}", flush=True)
    place = {"metadata": {"path": str(ROOT / "docs" / "lessons")}}
    try:
        client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place)
        client.extra_arguments = ["--log-level=ERROR"]
        client.execute()
    except CellExecutionError as error:
        raise ConfigError(f"{name} fails: {error.ename}: {error.evalue}") from error
    shown = "\n\n".join(part for cell in notebook.cells for part in _shown(cell))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept, shown)
    return shown


def _shown(cell: Any) -> Iterator[str]:
    if cell.cell_type != "code":
        yield cell.source
        return
    yield f"```python\n{cell.source}\n```"
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream" and output.name == "stdout":
            yield f"```text\n{output.text.rstrip()}\n```"
        elif "image/png" in data:
            # In the page itself.
            yield f"![What the cell above draws](data:image/png;base64,{data['image/png'].strip()})"
        elif "text/plain" in data:
            yield f"```text\n{data['text/plain']}\n```"


def _fingerprint(text: str) -> str:
    digest = hashlib.sha256(text.encode())
    sources = [*(ROOT / "minipeft").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def readable(text: str) -> str:
    """A lesson's text as MkDocs takes it: without the notebook's header, its answers folded, its outputs plain."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    return text.replace("<details>", '<details markdown="1">').replace("```output\n", "```text\n")

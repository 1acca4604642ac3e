"""The code blocks of README and docs: each command is run on a tiny model, or where that takes long is parsed."""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ok
from processes import run_process
from tiny_folder import save_model, write_jsonl

from minipeft.commands.cli import UsageError, build_parser
from minipeft.compare.plan import plan_runs

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("docs/command_line.md", "README.md", "CONTRIBUTING.md")),
    *sorted(path for path in ROOT.glob("docs/*.md") if path.name != "command_line.md"),
    *sorted(ROOT.glob("kernels/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
# Commands that other tests run, and that take long, a network, or packages that the tests do not install.
PARSED_ALONE = {"demo", "compare", "kernels", "bench", "docs", "export"}
# Pages with Python, and the tests that run it; that of the pages with None is run below.
PYTHON: dict[str, str | None] = {
    "README.md": None,
    "docs/emulator.md": None,
    "docs/paged_adamw.md": None,
    "docs/lora.md": "tests/test_docs.py",
    "docs/experts.md": "tests/test_docs.py",
    "docs/distributed.md": "tests/test_docs.py",
    "docs/tools.md": "tests/test_evaluators.py",
}


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in these languages."""
    return [code for language, code in BLOCK.findall(page.read_text()) if language in languages]


def commands() -> Iterator[tuple[str, list[str]]]:
    """The page and the words of every `minipeft` command in a shell block, in the order of the pages."""
    for page in PAGES:
        for block in blocks(page, "bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:^|&& |-m |\$\()minipeft (.*)", line)
                if found:
                    words = re.sub(r"\)\"\s*(#.*)?$", "", found[1])
                    yield str(page.relative_to(ROOT)), shlex.split(words, comments=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages call M, train.jsonl, test.jsonl and run.yaml."""
    made = tmp_path_factory.mktemp("pages")
    save_model(made / "M", max_position_embeddings=512)
    records = [{"prompt": f"{i} and one is ", "completion": str(i + 1)} for i in range(8)]
    for name in ("train", "test"):
        write_jsonl(made / f"{name}.jsonl", records)
    settings = "model: M\ndata: train.jsonl\noutput_dir: run\nmax_steps: 2\nsave_every: 1\n"
    (made / "run.yaml").write_text(settings)
    return made


def test_every_command_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ran = 0
    for page, words in commands():
        if words[0] in PARSED_ALONE:
            continue
        if words[0] == "train" and "--resume" not in words:
            shutil.rmtree("run", ignore_errors=True)
            # What several processes do, one does, too; the places of a cluster are not here.
            words = ["run" if word.startswith("/shared") else word for word in words]
        elif "--output" in words:
            shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
        for other in ("one", "other"):
            if Path("run/adapter").is_dir() and not Path(other).exists():
                shutil.copytree("run", other)
        if "--resume" in words:
            shutil.rmtree("run")
            ok("train", "--config", "run.yaml", "--max-steps", "1")
        assert ok(*words), f"{page}: minipeft {shlex.join(words)}"
        ran += 1
    assert ran > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_named_has_these_flags(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    named = [words for where, words in commands() if where == str(page.relative_to(ROOT))]
    # Inside a sentence three points stand for what is known.
    named += [
        [word for word in shlex.split(code) if word != "..."]
        for code in re.findall(r"`minipeft ((?:[^`'\n]|'[^`'\n]*')+)`", text)
    ]
    for words in named:
        if words[0] in ("bench", "COMMAND") or "--help" in words:
            continue
        try:
            build_parser(words).parse_args(words)
        except UsageError as error:
            # A sentence names a part of a command.
            assert "are required" in str(error), f"{page.name}: minipeft {shlex.join(words)}: {error}"


def test_all_python_is_run_somewhere() -> None:
    found = {str(page.relative_to(ROOT)) for page in PAGES if blocks(page, "python")}
    assert found == set(PYTHON)
    for page, runner in PYTHON.items():
        assert runner is None or Path(page).name in (ROOT / runner).read_text()


def test_the_python_of_the_readme_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    (block,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    path = str(folder / "M")
    session: dict[str, Any] = {"path": path, "another_base": AutoModelForCausalLM.from_pretrained(path)}
    exec(compile(block, "README.md", "exec"), session)
    assert type(session["model"]).__name__ == "LlamaForCausalLM" and not hasattr(session["model"], "peft_config")


def test_the_python_about_paged_adamw_runs(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/paged_adamw.md", "python")
    session: dict[str, Any] = {"model": torch.nn.Linear(4, 4)}
    exec(compile(block.replace('"/scratch"', repr(str(tmp_path))), "paged_adamw.md", "exec"), session)
    session["model"](torch.ones(1, 4)).sum().backward()
    session["optimizer"].step()
    session["optimizer"].close()


def test_the_python_about_the_emulator_runs(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/emulator.md", "python")
    # Triton reads a kernel's source from its file, and is not to be its own interpreter.
    (tmp_path / "page.py").write_text(block)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = run_process(["python", str(tmp_path / "page.py")], env=environment)
    assert ended.returncode == 0 and ended.stdout.strip(), ended.stderr


def test_the_runs_of_the_page_about_comparing_are_read(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs/comparison.md", "yaml")
    (tmp_path / "runs.yaml").write_text(block)
    assert [run.name for run in plan_runs(None, str(tmp_path / "runs.yaml"))] == ["small LoRA", "DoRA"]

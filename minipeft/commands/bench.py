"""`minipeft bench`: hands over to the benchmarks of a source checkout, which an installed package does not carry."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from minipeft.train.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks' own arguments. Raises TrainingError where minipeft does not run from its sources."""
    load_benchmarks()
    importlib.import_module("benchmarks.options").add_arguments(parser)


def bench(args: argparse.Namespace) -> None:
    """Check and time the operations beside their peers, print tables, write CSV and PNG.

    Raises:
        TrainingError: an operation or device is not there, or a result of minipeft was wrong.
    """
    importlib.import_module("benchmarks.options").ask_for_huge_pages()
    importlib.import_module("benchmarks.run").run(args)


def load_benchmarks(root: Path = ROOT) -> None:
    """Make `root`/benchmarks importable as `benchmarks`, without touching sys.path.

    Raises:
        TrainingError: there is none: minipeft is installed and not run from its sources.
    """
    folder = root / "benchmarks"
    # Another package may have left a folder of that name beside an installed one.
    if not (folder / "__init__.py").is_file() or not (folder / "bench_nf4_matmul.py").is_file():
        raise TrainingError(
            f"minipeft bench needs a source checkout, and {root} is not one: clone the repository and "
            "`pip install -e .` in it"
        )
    if str(folder) in getattr(sys.modules.get("benchmarks"), "__path__", []):
        return
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])

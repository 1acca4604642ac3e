"""`minipeft bench`: the benchmarks of a source checkout, which an installed package does not carry."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from minipeft.train.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
OPS = (
    "nf4_quantize",
    "nf4_dequantize",
    "nf4_matmul",
    "lora_matmul",
    "adamw",
    "paged_adamw",
    "finetune",
    "finetune_growth",
)


class BenchError(TrainingError, ValueError):
    """The benchmarks are not there, cannot measure what was asked for, or found a wrong result."""


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `minipeft bench`, read by `bench`."""
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"what to measure (default: all): {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="run each once on a small size: shows that all works")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose title has this in it")
    parser.add_argument("--model", metavar="DIR", help="model that finetune measures (default: the demo's)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for CSV and PNG (default: benchmarks/results; quick: none)"
    )


def bench(args: argparse.Namespace) -> None:
    """Check and time the operations beside their peers, print tables, write CSV and PNG.

    Raises:
        BenchError: this is no source checkout, an operation or device is not there, or a result of ours was wrong.
    """
    ask_for_huge_pages()
    load_benchmarks()
    run = importlib.import_module("benchmarks.run")
    bad = run.bench(args.ops, args.quick, args.device, args.output, args.threads, args.model, args.only)
    if bad:
        raise BenchError(f"{len(bad)} results of minipeft are not right: {'; '.join(bad)}")


def ask_for_huge_pages() -> None:
    """Have PyTorch allocate large results on the CPU in huge pages; works before its first tensor only.

    In small pages, which Linux hands out at the first touch of each, a fresh result of 64 MB takes 26 ms longer, or
    not, as the allocator happens to have kept the last one: more than what is measured, and by chance.
    """
    os.environ.setdefault(HUGE_PAGES, "1")


def load_benchmarks(root: Path = ROOT) -> ModuleType:
    """Make `root`/benchmarks importable as `benchmarks`, without touching sys.path.

    Raises:
        BenchError: there is none: minipeft is installed and not run from its sources.
    """
    folder = root / "benchmarks"
    file = folder / "__init__.py"
    # Another package may have left a folder of that name beside an installed one.
    if not file.is_file() or not (folder / "bench_nf4_matmul.py").is_file():
        raise BenchError(
            f"minipeft bench needs a source checkout, and {root} is not one: clone the repository and "
            "`pip install -e .` in it"
        )
    known = sys.modules.get("benchmarks")
    if known is not None and str(folder) in getattr(known, "__path__", []):
        return known
    spec = importlib.util.spec_from_file_location("benchmarks", file, submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)
    return module

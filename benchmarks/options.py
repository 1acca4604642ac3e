"""The command line of the benchmarks: their operations and flags, and the error for what cannot be measured.

Nothing here imports torch: huge pages must be asked for before its first tensor.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minipeft.train.errors import TrainingError

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
OPS = (
    "nf4_quantize",
    "nf4_dequantize",
    "nf4_matmul",
    "lora_matmul",
    "experts",
    "adamw",
    "paged_adamw",
    "finetune",
    "finetune_growth",
)


class BenchError(TrainingError, ValueError):
    """An operation or a device cannot be measured, or a result of minipeft was wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run.bench` takes."""
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"what to measure (default: all): {', '.join(OPS)}")
    parser.add_argument("--quick", action="store_true", help="run each once on a small size: shows that all works")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="that the timed rounds of a case take (default: 3, on a GPU 1)"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose this GPU's tiles by a sweep of --seconds (default: 240), and keep them",
    )
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose title has this in it")
    parser.add_argument("--model", metavar="DIR", help="model that finetune measures (default: the demo's)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for CSV and PNG (default: benchmarks/results; quick: none)"
    )


def ask_for_huge_pages() -> None:
    """Have PyTorch allocate large results on the CPU in huge pages; works before its first tensor only.

    In small pages, which Linux hands out at the first touch of each, a fresh result of 64 MB takes 26 ms longer, or
    not, as the allocator happens to have kept the last one: more than what is measured, and by chance.
    """
    os.environ.setdefault(HUGE_PAGES, "1")

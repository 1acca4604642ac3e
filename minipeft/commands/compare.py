"""`minipeft compare`: several methods on one task, in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.commands.arguments import positive
from minipeft.commands.paths import check_output_path
from minipeft.compare.plan import CompareConfig, parse_names, parse_seeds, plan_runs
from minipeft.methods import METHODS
from minipeft.train.config import DTYPE_CHOICES

SOME_FAILED = 1


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `minipeft compare`, read by `compare`."""
    parser.add_argument(
        "--output",
        default="minipeft-compare",
        metavar="DIR",
        help="folder for everything (default: ./minipeft-compare); finished runs in it are kept, so a comparison "
        "that was interrupted goes on",
    )
    parser.add_argument("--methods", metavar="A,B", help=f"methods with our settings (default: {','.join(METHODS)})")
    parser.add_argument(
        "--runs",
        metavar="FILE",
        help="YAML file of further runs, {name: {method: lora, method_args: {r: 4}, lr: 0.002}, ...}; without "
        "--methods there are only these",
    )
    parser.add_argument("--seeds", default="1", metavar="N", help="how many, or which: 0,1,2 (default: 1, the seed 0)")
    parser.add_argument("--model", help="model directory, hub name or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", metavar="FILE", help="JSONL file of records (default: the demo's rated snippets)")
    parser.add_argument("--eval-data", metavar="FILE", help="held-out records (default: a fifth of --data)")
    parser.add_argument("--other-text", metavar="FILE", help="text of another kind (default: of a constitution)")
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="optimizer steps of a run (default: one pass over the data)"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="rows in a step (default: 2 packed, or 8 single texts)"
    )
    parser.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="pack several texts into a row (default: only with the demo's data)",
    )
    parser.add_argument(
        "--max-length", type=positive, metavar="N", help="longest text in tokens (default: 1024 or the model's limit)"
    )
    parser.add_argument(
        "--too-long", choices=("error", "drop"), default="error", help="what to do with longer texts (default: error)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default="auto",
        help="dtype of the model (default: bfloat16 where the processor multiplies it, else float32)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def compare(args: argparse.Namespace) -> int:
    """Compare, and return 0, or 1 when a run failed."""
    output = Path(args.output)
    runs = plan_runs(None if args.methods is None else parse_names(args.methods), args.runs)
    config = CompareConfig(
        output,
        runs,
        parse_seeds(args.seeds),
        **{
            name: getattr(args, name)
            for name in ("model", "data", "eval_data", "other_text", "packing", "batch_size", "steps", "max_length")
        },
        too_long=args.too_long,
        dtype=args.dtype,
        device=args.device,
    )
    check_output_path(output, may_exist=True)

    from minipeft.compare.compare import compare as run_comparison

    return SOME_FAILED if run_comparison(config).failures else 0

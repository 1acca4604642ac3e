"""`minipeft demo`, `inspect` and `kernels`: arguments handed on to the module that does the work."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.commands.paths import check_output_path
from minipeft.training.errors import TrainingError


class KernelsError(TrainingError, ValueError):
    """A target that cannot be compiled for, or a compiler or peer that is not there."""


def inspect(args: argparse.Namespace) -> None:
    """`minipeft inspect`: say what a directory holds."""
    from minipeft.training.inspection import describe

    print(describe(args.path))


def demo(args: argparse.Namespace) -> None:
    """`minipeft demo`: the whole job on a small real model."""
    check_output_path(Path(args.output), may_exist=False)

    from minipeft.training.demo import DemoConfig, run_demo

    run_demo(DemoConfig(output=Path(args.output), model=args.model, data=args.data, steps=args.steps, seed=args.seed))


def kernels(args: argparse.Namespace) -> None:
    """`minipeft kernels`: the machine code of the GPU kernels, compiled here."""
    options = ["--target", args.target, "--dtype", args.dtype]
    options += ["--against", args.against] if args.against else []
    options += ["--json", args.json] if args.json else []
    try:
        from minipeft.kernels.offline import main

        print(main(options), end="")
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise KernelsError(str(error)) from error

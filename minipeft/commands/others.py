"""`minipeft demo`, `inspect`, `compare` and `kernels`: arguments handed on to the module that does the work."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.commands.arguments import check_output_path
from minipeft.train.errors import TrainingError

SOME_FAILED = 1


class KernelsError(TrainingError, ValueError):
    """A target that cannot be compiled for, or a compiler or peer that is not there."""


def inspect(args: argparse.Namespace) -> None:
    """`minipeft inspect`: say what a directory holds.

    With --verify, if its checkpoints are as they were written; with --for, how a server reads its adapter; of a model
    with an adapter, --tree, --quantize, --json or --html, its modules.

    Raises:
        InspectError: see `describe`, `verify` and `servers.served_by`; `show.tree` says what the last raises.
    """
    from minipeft.commands.inspect import InspectError, describe, holds_model, verify
    from minipeft.commands.servers import served_by

    if args.adapter is not None or args.tree or args.quantize or args.json or args.html is not None:
        if args.server is not None or args.verify:
            raise InspectError(
                "--for and --verify do not go with ADAPTER, --tree, --quantize, --json or --html: leave these out"
            )
        from minipeft.commands.show import description, tree

        modules = args.adapter is not None or args.tree or args.quantize or holds_model(args.path)
        (tree if modules else description)(args)
        return
    if args.server is not None:
        print(served_by(args.path, args.server))
        return
    if not args.verify:
        print(describe(args.path))
        return
    for line in verify(args.path):
        print(line)


def demo(args: argparse.Namespace) -> None:
    """`minipeft demo`: the whole job on a small real model."""
    check_output_path(Path(args.output), may_exist=False)

    from minipeft.demo.demo import DemoConfig, run_demo

    run_demo(DemoConfig(output=Path(args.output), model=args.model, data=args.data, steps=args.steps, seed=args.seed))


def compare(args: argparse.Namespace) -> int:
    """`minipeft compare`: several methods on one task; return 0, or 1 when a run failed."""
    from minipeft.compare.plan import CompareConfig, parse_names, parse_seeds, plan_runs

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


def kernels(args: argparse.Namespace) -> None:
    """`minipeft kernels`: the machine code of the GPU kernels, compiled here; with --profile, one of them emulated.

    Raises:
        KernelsError: flags that do not go together, a target that is unknown, or a compiler that is missing.
    """
    try:
        if args.profile is not None:
            _profile(args)
            return
        if args.shape is not None or args.plot is not None:
            raise KernelsError("--shape and --plot go with --profile OPERATION")
        options = ["--target", args.target, "--dtype", args.dtype]
        options += ["--against", args.against] if args.against else []
        options += ["--json", args.json] if args.json else []
        from minipeft_kernels.lab.offline import main

        print(main(options), end="")
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise KernelsError(str(error)) from error


def _profile(args: argparse.Namespace) -> None:
    if args.against or args.json:
        raise KernelsError("--against and --json are of the machine code, and do not go with --profile")
    shape = (args.shape or "").split(",")
    if not all(part.isdigit() for part in shape):
        raise KernelsError(
            f"--shape must be numbers with commas between them, such as 16,4096,4096, got {args.shape!r}"
        )
    if args.plot is not None and not Path(args.plot).absolute().parent.is_dir():
        raise KernelsError(f"cannot write {args.plot}: its folder does not exist")
    from minipeft_kernels.lab.profile import profile, report

    found = profile(args.profile, [int(part) for part in shape], args.target, args.dtype)
    print(report(found), end="")
    if args.plot is not None:
        from minipeft.commands.kernel_plots import plot_profile

        plot_profile(found, Path(args.plot))
        print(f"picture       {args.plot}")

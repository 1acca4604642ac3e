"""The command: chosen operations on one device, each checked, timed, shown, and written to CSV and PNG."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.device import Device, open_device
from benchmarks.environment import ROOT, backend, describe_environment, describe_limits, device_name, device_slug, load
from benchmarks.harness import OURS, SECONDS_PER_CASE, Row, describe, measure
from benchmarks.limits import Roofline, roofline_of
from benchmarks.options import OPS, BenchError, add_arguments
from benchmarks.output import case_title, plot, table, write_csv
from benchmarks.peers import Peers
from benchmarks.shapes import Sizes, sizes_for

RESULTS = Path(__file__).resolve().parent / "results"
NOTE = "Each result is checked first; times are of interleaved rounds, caches emptied before each call."
QUICK_NOTE = (
    "Each result is checked; a time is of one call of a small size, warm: it shows that all runs, not how fast."
)


def main(argv: Sequence[str]) -> int:
    """`python -m benchmarks` with these arguments: 0 when every result of ours was right, 1 if not, 2 for bad ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        bad = _bench(args)
    except BenchError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


def run(args: argparse.Namespace) -> None:
    """As `bench`, of the arguments of `minipeft bench`. Raises BenchError if a result of minipeft was wrong, too."""
    if bad := _bench(args):
        raise BenchError(f"{len(bad)} results of minipeft are not right: {'; '.join(bad)}")


def _bench(args: argparse.Namespace) -> list[str]:
    if args.tune:
        return _tune(args)
    return bench(args.ops, args.quick, args.device, args.output, args.threads, args.model, args.only, args.seconds)


def _tune(args: argparse.Namespace) -> list[str]:
    others = ("ops", "quick", "device", "threads", "model", "only")
    if given := [name for name in others if getattr(args, name) and (name, args.device) != ("device", "cuda")]:
        word = given[0] if given[0] == "ops" else f"--{given[0]}"
        raise BenchError(f"--tune takes --seconds and --output alone, got {word} {getattr(args, given[0])!r}")
    _check_seconds(args.seconds)
    words = ["minipeft bench --tune", *([f"--seconds {args.seconds:g}"] if args.seconds else [])]
    # It needs triton, which the benchmarks on a CPU do not.
    tune = importlib.import_module("benchmarks.tune").tune
    print(f"written: {tune(args.seconds, args.output, ' '.join(words))}")
    return []


def _check_seconds(seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < float("inf"):
        raise BenchError(f"seconds must be above 0, got {seconds}")


@dataclass(frozen=True)
class Session:
    """The device, its limits, the sizes and the options that all operations of a run share.

    folder: for the files, or None for none. options: of the command line. only: what titles must have in them.
    seconds: that the rounds of a case take.
    """

    device: Device
    roofline: Roofline
    sizes: Sizes
    quick: bool
    folder: Path | None
    options: list[str]
    only: str | None = None
    seconds: float = SECONDS_PER_CASE

    @property
    def kind(self) -> str:
        """The type of the device: "cpu" or "cuda"."""
        return self.device.torch_device.type


def bench(
    ops: Sequence[str] = (),
    quick: bool = False,
    device_kind: str | None = None,
    output: Path | None = None,
    threads: int | None = None,
    model: str | None = None,
    only: str | None = None,
    seconds: float | None = None,
) -> list[str]:
    """Measure operations, print their tables and write their files.

    Args:
        ops: some of OPS; empty for all.
        quick: each once, on a small size.
        device_kind: "cpu", "cuda", or None for CUDA where there is one.
        output: the folder for files; None for benchmarks/results, or for no files when quick.
        threads: of the CPU; None for as many as PyTorch takes.
        model: folder of the model that "finetune" measures; None for the demo's, or for a tiny one when quick.
        only: what a case's title must have in it to be measured; no files are written then, unless `output` is given.
        seconds: that the timed rounds of a case should take; None for 3, on a GPU for 1.

    Returns:
        A line for each result of ours that was wrong, or failed.

    Raises:
        BenchError: an operation or a device that there is not.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise BenchError(f"there is no operation {unknown[0]!r} to measure: choose of {', '.join(OPS)}")
    if threads is not None:
        if threads < 1:
            raise BenchError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    _check_seconds(seconds)
    chosen = list(ops) or list(OPS)
    device = open_device(device_kind, quick)
    kind, name = device.torch_device.type, device_name(device.torch_device)
    ours = f"{OURS}'s operations: {backend(device.torch_device)}"
    print(f"{kind}: {name}, {torch.get_num_threads()} CPU threads, load {load()}; {ours}")
    print(QUICK_NOTE if quick else NOTE)
    folder = output or (None if quick or only else RESULTS)
    options = [*["--quick"] * quick, "--device", kind, *(["--threads", str(threads)] if threads else [])]
    options += [*(["--model", model] if model else []), *(["--only", only] if only else [])]
    options += ["--seconds", str(seconds)] if seconds else []
    sizes = dataclasses.replace(sizes_for(kind, quick), model=model)
    session = Session(device, roofline_of(device, name, quick), sizes, quick, folder, options, only)
    session = dataclasses.replace(session, seconds=seconds or (1.0 if kind == "cuda" else SECONDS_PER_CASE))
    bad: list[str] = []
    for i, op in enumerate(chosen):
        bad += [f"{case_title(row)}: {row.status}: {row.note}" for row in run_op(op, session) if _is_bad(row)]
        if chosen[i + 1 :] and not _alive(device):
            # An illegal access ends a process's use of the GPU, not that of the next process.
            print(f"{op} left the device unusable for this process: the rest runs in a new one", file=sys.stderr)
            return bad + _in_new_process(chosen[i + 1 :], session)
    return bad


def run_op(op: str, session: Session) -> list[Row]:
    """Measure one operation, print its table, and write its files into the session's folder, if any."""
    torch.manual_seed(0)
    rows: list[Row] = []
    device, before = session.device.torch_device, load()
    environment = describe_environment(device, " ".join(["minipeft bench", op, *session.options]))
    module = importlib.import_module(f"benchmarks.bench_{op}")
    try:
        session.roofline.measure_again()
        for case in module.cases(device, session.sizes, Peers(session.kind)):
            if session.only is not None and session.only not in case_title(case):
                continue
            rows += measure(case, session.device, session.roofline, session.quick, session.seconds)
            _progress(case_title(case))
    # On hardware that we have not seen, preparing a case may fail too.
    except Exception as error:
        rows.append(Row(op, "", "preparing a case", "", OURS, "failed", describe(error)))
    _progress("")
    print(f"\n{table(rows, session.quick)}", flush=True)
    # What a module concludes from all its rows (slopes) stands above them in the file.
    found = module.summary(rows) if hasattr(module, "summary") else {}
    print("".join(f"\n{name}: {value}" for name, value in found.items()))
    if session.folder is not None:
        busy = f"{before} before, {load()} after (processes wanting a CPU, mean of the last minute)"
        environment |= {**found, **describe_limits(session.roofline), "clock": session.device.clock, "load": busy}
        draw = getattr(module, "plot", plot)
        write_files(session.folder, op, device_slug(device), rows, environment, draw)
    return rows


def write_files(
    folder: Path,
    op: str,
    slug: str,
    rows: Sequence[Row],
    environment: dict[str, str],
    draw: Callable[[Path, Sequence[Row], str], None],
) -> None:
    """`<op>-<device>.csv`, and `.png` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    csv, png = folder / f"{op}-{slug}.csv", folder / f"{op}-{slug}.png"
    write_csv(csv, rows, environment)
    title = f"{op} on {environment['device']}, {environment['date'][:10]}, load {environment['load'].split(' (')[0]}"
    try:
        draw(png, rows, title)
    except ImportError:
        print(f"written: {csv} (no picture: pip install matplotlib)")
        return
    print(f"written: {csv} and {png.name}")


def _is_bad(row: Row) -> bool:
    return row.candidate == OURS and row.status != "right"


def _alive(device: Device) -> bool:
    try:
        device.synchronize()
    except RuntimeError:
        return False
    return True


def _in_new_process(ops: Sequence[str], session: Session) -> list[str]:
    words = [sys.executable, "-m", "benchmarks", *ops, *session.options]
    words += ["--output", str(session.folder.resolve())] if session.folder else []
    code = subprocess.run(words, cwd=ROOT, check=False).returncode
    return [f"{', '.join(ops)}: see above"] if code else []


def _progress(text: str) -> None:
    """Show what was done last, where somebody may be watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

"""The command: stages one after the other, each in a process and a box of time; the summary last."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.first_contact import report
from benchmarks.first_contact.record import Contact, append, read_rows

# Seconds that each stage may take, and in which call it runs.
BOXES = {
    "machine": 25,
    "checks": 60,
    "products": 100,
    "host": 45,
    "suite": 100,
    "sweep": 105,
    "step": 120,
    "optimizers": 35,
    "thin": 90,
    "counters": 60,
}
PHASES = {
    "smoke": ("machine", "suite", "checks", "products", "host"),
    "main": ("step", "optimizers", "counters", "thin", "sweep"),
}
# Pretending, these run the compiled kernels in the emulator; elsewhere it would show nothing more, and take minutes.
EMULATED = ("checks", "thin", "sweep")
SPARED = 8.0  # seconds before the deadline that no stage gets


def main(argv: list[str]) -> int:
    """0 when all stages ended well and nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_contact", description=__doc__)
    parser.add_argument("phase", choices=tuple(PHASES))
    parser.add_argument("--only", action="append", choices=tuple(BOXES), help="this stage alone (may be repeated)")
    parser.add_argument("--deadline", type=float, default=400.0, metavar="S", help="seconds for everything")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "first_contact")), metavar="DIR")
    parser.add_argument("--pretend", action="store_true", help="on a CPU, tiny sizes: shows that all runs")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.stage:
        contact = Contact(args.output, args.stage, args.pretend)
        importlib.import_module(f"benchmarks.first_contact.{args.stage}").run(contact)
        return 0
    started = time.monotonic()
    for stage in args.only or PHASES[args.phase]:
        left = args.deadline - (time.monotonic() - started) - SPARED
        if left < 5:
            append(args.output, {"stage": stage, "ended": "not begun: no time left"})
            continue
        _stage(stage, min(BOXES[stage], left), args)
    return report.show(read_rows(args.output))


def _stage(stage: str, seconds: float, args: argparse.Namespace) -> None:
    words = [sys.executable, "-m", "benchmarks.first_contact", args.phase, "--stage", stage]
    words += ["--output", str(args.output), *(["--pretend"] if args.pretend else [])]
    environment = {**os.environ, "SWEEP_SECONDS": str(seconds - 10)}
    if args.pretend:
        backend = "ptx" if stage in EMULATED else "reference"
        environment |= {"MINIPEFT_BACKEND": backend, "MINIPEFT_PTX_TARGET": "sm_90", "TRITON_INTERPRET": "0"}
    start = time.monotonic()
    log = args.output / "stderr.txt"
    with log.open("a") as errors:
        process = subprocess.Popen(words, stderr=errors, env=environment, start_new_session=True)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"killed after its {seconds:.0f} s"
    row = {"stage": stage, "ended": code, "seconds": round(time.monotonic() - start, 1)}
    if code != 0:
        row["errors"] = log.read_text()[-1500:]
    append(args.output, row)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

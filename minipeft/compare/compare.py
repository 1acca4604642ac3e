"""Several methods on one task: the same data in the same order, one process a run, one table.

<output>/
  comparison.json     what all runs share; `results.json` holds what came out
  train.jsonl held_out.jsonl other.txt
  runs/<name>-seed<k>/   log, adapter and result of a run
  table.md results.csv results.json comparison.png comparison.html

A comparison that was interrupted goes on: runs that are finished are kept.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from minipeft.compare.data import load_task
from minipeft.compare.pages import write_pages
from minipeft.compare.plan import CompareConfig
from minipeft.compare.prepare import (
    check_folder,
    check_runs,
    choose_threads,
    fit_to_model,
    make_orders,
    open_folder,
)
from minipeft.compare.rows import Outcome, Table, make_table, say_outcome
from minipeft.compare.run import FAILED, RESULT, Order
from minipeft.compare.table import plain_text, write_table
from minipeft.demo.demo import say_now
from minipeft.demo.smollm2 import smollm2_folder
from minipeft.files import remove_directory, write_text
from minipeft.train.report import check_matplotlib
from minipeft.train.run import hold_run

Say = Callable[[str], None]


def compare(config: CompareConfig, say: Say = say_now, execute: Callable[[Order], None] | None = None) -> Table:
    """Train and measure whatever is not done yet, write everything, and say how it goes.

    Args:
        execute: does one run; None starts a process for it.

    Raises:
        TrainingError: bad settings, data, model or output folder, all found before a model is loaded. A run that
            fails is no error: the table says why.
    """
    started = time.perf_counter()
    check_matplotlib()
    check_runs(config)
    check_folder(config.output)

    say("The data")
    task = load_task(config.data, config.eval_data, config.other_text, say)
    model = config.model or str(smollm2_folder(say))
    task, shared = fit_to_model(config, task, model)
    say(f"{task.about}\n{len(task.train)} texts to learn from, {len(task.held_out)} others held out to measure on.")
    orders = make_orders(config, task, shared, choose_threads(config.output, say))

    config.output.mkdir(exist_ok=True)
    with hold_run(config.output):
        open_folder(config.output, task, orders)
        outcomes = [
            _outcome(order, f"[{number}/{len(orders)}]", say, execute or in_own_process)
            for number, order in enumerate(orders, 1)
        ]
        _check_batches(outcomes)
        table = make_table(outcomes, task, shared)
        write_table(table, outcomes, config.output)
        write_pages(table, config.output)

    say(f"\n{plain_text(table)}\n")
    for line in (*table.notes, *table.failures):
        if line not in task.about:
            say(line)
    say(f"\ntable    {config.output / 'table.md'}\npicture  {config.output / 'comparison.png'}")
    say(f"page     {config.output / 'comparison.html'}\ntime     {time.perf_counter() - started:.0f} s")
    return table


def _outcome(order: Order, where: str, say: Say, execute: Callable[[Order], None]) -> Outcome:
    """The result of a run, from its folder or made now."""
    run, folder = order.run, Path(order.folder)
    said = f"{where} {run.name}" + ("" if run.is_base else f", seed {order.seed}")
    if (folder / RESULT).exists():
        say(f"\n{said}: done before")
    else:
        say(f"\n{said}")
        if folder.exists():
            # What is left of a run that was interrupted, or failed.
            remove_directory(folder)
        folder.mkdir(parents=True)
        execute(order)
    if (folder / RESULT).exists():
        outcome = Outcome(run, order.seed, result=json.loads((folder / RESULT).read_text(encoding="utf-8")))
    else:
        reason = json.loads((folder / FAILED).read_text(encoding="utf-8"))["reason"]
        outcome = Outcome(run, order.seed, reason=reason)
    say(say_outcome(outcome))
    return outcome


def in_own_process(order: Order) -> None:
    """Do a run in a process of its own, which ends with ours; afterwards its folder holds a result or a reason."""
    command = [sys.executable, "-m", "minipeft.compare.run"]
    # A session of its own, so that Ctrl-C reaches us alone.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(order.to_json().encode() + b"\n")
            process.stdin.flush()
        code = process.wait()
    finally:
        # Nothing but an interruption of ours finds it still running.
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    folder = Path(order.folder)
    if not (folder / RESULT).exists() and not (folder / FAILED).exists():
        write_text(folder / FAILED, json.dumps({"reason": _death(code)}) + "\n")


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def _check_batches(outcomes: Sequence[Outcome]) -> None:
    """Make sure of what the comparison stands on: with one seed all runs took the same batches in the same order."""
    seen: dict[int, set[str]] = {}
    for outcome in outcomes:
        if outcome.result is not None and not outcome.run.is_base:
            seen.setdefault(outcome.seed, set()).add(outcome.result["batches"])
    for seed, digests in seen.items():
        assert len(digests) == 1, f"the runs of seed {seed} took different batches"

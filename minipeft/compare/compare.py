"""Several methods on one task: the same data in the same order, one process a run, one table.

<output>/
  comparison.json     what all runs share
  train.jsonl held_out.jsonl other.txt
  runs/<name>-seed<k>/   log, adapter and result of a run
  table.md results.csv results.json comparison.png comparison.html

A comparison that was interrupted goes on: runs that are finished are kept. Everything is checked and decided before a
model is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minipeft.compare.page import write_pages
from minipeft.compare.plan import CompareConfig, Run, Shared, bases_of, train_config
from minipeft.compare.run import FAILED, RESULT, RunOrder
from minipeft.compare.table import Outcome, Table, make_rows, make_table, plain_text, write_table
from minipeft.compare.task import WINDOW, Task, encode_task, load_task, task_hashes, without_long
from minipeft.demo.assets import smollm2_folder
from minipeft.files import remove_directory, remove_leftovers, size, write_text
from minipeft.stored import read_object
from minipeft.train.errors import CheckpointError, ConfigError, OutputDirError, as_user_error
from minipeft.train.evaluation import perplexity
from minipeft.train.methods import check_settings
from minipeft.train.models import load_tokenizer, resolve_device, resolve_max_length, text_positions
from minipeft.train.report import check_matplotlib
from minipeft.train.run import check_identity, hold_run
from minipeft_kernels.arithmetic import arithmetic_dtype

# The file of all that the runs share, and the folder of the runs.
COMPARISON, RUNS = "comparison.json", "runs"

# Rows in a step: packed ones, each of so many tokens (enough for several of the demo's texts), or single texts.
PACKED_ROWS, ROW_TOKENS, SINGLE_ROWS = 2, 128, 8


def say_now(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def compare(
    config: CompareConfig,
    say: Callable[[str], None] = say_now,
    execute: Callable[[RunOrder], None] | None = None,
) -> Table:
    """Train and measure the runs that are not done yet, write everything, and print a report as it goes.

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
    orders = make_orders(config, task, shared, choose_threads(config.output))

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


def _outcome(order: RunOrder, where: str, say: Callable[[str], None], execute: Callable[[RunOrder], None]) -> Outcome:
    """The result of a run, from its folder or made now."""
    run, folder = order.run, Path(order.folder)
    said = f"{where} {run.name}" + ("" if run.is_base else f", seed {order.seed}")
    if (folder / RESULT).exists():
        say(f"\n{said}: done before")
    else:
        say(f"\n{said}")
        if folder.exists():
            # The rest of a run that was interrupted, or failed.
            remove_directory(folder)
        folder.mkdir(parents=True)
        execute(order)
    if (folder / RESULT).exists():
        outcome = Outcome(run, order.seed, result=read_object(folder / RESULT, CheckpointError))
    else:
        reason = str(read_object(folder / FAILED, CheckpointError).get("reason"))
        outcome = Outcome(run, order.seed, reason=reason)
    say(say_outcome(outcome))
    return outcome


def say_outcome(outcome: Outcome) -> str:
    """One line on what a run gave."""
    if outcome.result is None:
        return f"failed: {outcome.reason}"
    row = make_rows([outcome])[0]
    assert row.loss is not None
    parts = [f"perplexity {perplexity(row.loss):.3g}", f"peak memory {size(row.peak_memory or 0)}"]
    if row.accuracy is not None and row.accuracy_error is not None:
        parts.insert(0, f"accuracy {100 * row.accuracy:.1f} % ± {100 * row.accuracy_error:.1f}")
    if row.step_median is not None:
        parts.append(f"{row.steps} steps, {row.step_median:.3g} s each, {row.train_seconds:.0f} s in all")
    return ", ".join(parts)


def in_own_process(order: RunOrder) -> None:
    """Do a run in a process of its own, which ends with this one; afterwards its folder holds a result or a reason."""
    command = [sys.executable, "-m", "minipeft.compare.run"]
    # A session of its own, so that Ctrl-C reaches this process alone.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(order.to_json().encode() + b"\n")
            process.stdin.flush()
        code = process.wait()
    finally:
        # The run's process is still alive only if this process was interrupted.
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
    """Check the ground of the comparison: with one seed all runs took the same batches in the same order."""
    seen: dict[int, set[str]] = {}
    for outcome in outcomes:
        if outcome.result is not None and not outcome.run.is_base:
            seen.setdefault(outcome.seed, set()).add(outcome.result["batches"])
    for seed, digests in seen.items():
        assert len(digests) == 1, f"the runs of seed {seed} took different batches"


def check_runs(config: CompareConfig) -> None:
    """Check all settings that can be checked without a model.

    Raises:
        ConfigError: a setting of a run is wrong; the run is named.
    """
    with as_user_error(ConfigError):
        resolve_device(config.device)
    draft = Shared("model", 1, 1, False, config.batch_size or 1, config.steps, config.epochs, "auto", config.device)
    for run in config.runs:
        _adapter_config(run, draft)


def _adapter_config(run: Run, shared: Shared) -> Any:
    try:
        return check_settings(train_config(run, shared, 0, Path("run"), Path("data")))
    except ConfigError as error:
        raise ConfigError(f"{run.where}: {error}") from None


def check_folder(folder: Path) -> None:
    """Raise OutputDirError for a folder that holds something else than a comparison."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / COMPARISON).is_file():
        raise OutputDirError(f"{folder} is not empty and holds no comparison ({COMPARISON}): choose another --output")


def fit_to_model(config: CompareConfig, task: Task, model: str) -> tuple[Task, Shared]:
    """The task as this model can take it, and the settings that all runs share.

    Raises:
        ModelLoadError: no such model.
        DataError: a text that is too long for the model or one of the methods.
    """
    tokenizer = load_tokenizer(model)
    packing = config.packing if config.packing is not None else config.data is None
    rows = config.batch_size or (PACKED_ROWS if packing else SINGLE_ROWS)
    dtype = config.dtype
    if dtype == "auto":
        # Emulated bfloat16 would be many times slower than float32.
        dtype = str(arithmetic_dtype(torch.bfloat16, resolve_device(config.device))).removeprefix("torch.")
    shared = Shared(model, 1, 1, packing, rows, config.steps, config.epochs, dtype, config.device)
    max_length = _common_length(config, shared)
    if config.too_long == "drop":
        task = without_long(task, tokenizer, max_length)
    shared = dataclasses.replace(shared, max_length=max_length, window=min(WINDOW, max_length))
    encoded = encode_task(task, tokenizer, shared)
    # The longest text and not the limit, which depends on the methods that are compared.
    used = min(max_length, max(ROW_TOKENS, encoded.longest)) if packing else encoded.longest
    return task, dataclasses.replace(shared, max_length=used)


def _common_length(config: CompareConfig, shared: Shared) -> int:
    """One length for all methods, so that all see the same texts: the room left by the most virtual tokens."""
    positions = [text_positions(shared.model, _adapter_config(run, shared)) for run in config.runs]
    (limit, virtual), run = max(zip(positions, config.runs, strict=True), key=lambda pair: pair[0][1])
    try:
        return resolve_max_length(config.max_length, limit, virtual)
    except ConfigError as error:
        raise ConfigError(f"{run.where}: {error}" if virtual else str(error)) from None


def choose_threads(folder: Path) -> int:
    """CPU threads for every run: as many as the comparison in `folder` began with, for times that can be compared."""
    if not (folder / COMPARISON).is_file():
        return torch.get_num_threads()
    return _read(folder / COMPARISON, "threads", "choose another --output")


def make_orders(config: CompareConfig, task: Task, shared: Shared, threads: int) -> list[RunOrder]:
    """The orders for all runs, the base models first; each has its identity, by which a later call knows it again."""
    common: dict[str, Any] = {"labels": task.labels}
    common |= {f"sha256 of {name}": value for name, value in task_hashes(task).items()}
    common |= {name: value for name, value in dataclasses.asdict(shared).items() if name != "device"}
    if Path(shared.model).exists():
        common["model"] = str(Path(shared.model).resolve())
    orders = []
    for run in [*bases_of(config.runs), *config.runs]:
        # A base model has no seed.
        for seed in config.seeds[:1] if run.is_base else config.seeds:
            own = {f"setting {name!r}": value for name, value in run.settings.items()}
            orders.append(
                RunOrder(
                    comparison=str(config.output),
                    folder=str(config.output / RUNS / _folder_name(run, seed)),
                    run=run,
                    shared=shared,
                    seed=seed,
                    labels=task.labels,
                    threads=threads,
                    # Through JSON, so that it equals what is read back.
                    identity=json.loads(json.dumps({**common, **own, "seed": None if run.is_base else seed})),
                )
            )
    return orders


def _folder_name(run: Run, seed: int) -> str:
    """A folder name for any file system, different for different runs."""
    plain = re.sub(r"[^a-z0-9.]+", "-", run.name).strip(".-")
    if plain != run.name:
        plain += "-" + hashlib.sha256(run.name.encode()).hexdigest()[:8]
    return plain.lstrip("-") if run.is_base else f"{plain.lstrip('-')}-seed{seed}"


def open_folder(folder: Path, task: Task, orders: Sequence[RunOrder]) -> None:
    """Start a comparison in `folder`, or go on with the one there.

    Raises:
        CheckpointError: it is another one, or a finished run there had other settings.
    """
    shared = {name: value for name, value in orders[0].identity.items() if "setting" not in name and name != "seed"}
    description = folder / COMPARISON
    if description.is_file():
        _check_same(description, shared, "choose another --output")
    for order in orders:
        result = Path(order.folder) / RESULT
        if result.exists():
            _check_same(result, order.identity, f"remove {order.folder}, or choose another --output")
    remove_leftovers(folder)
    task.write(folder)
    write_text(description, json.dumps({"identity": shared, "threads": orders[0].threads}, indent=2) + "\n")
    (folder / RUNS).mkdir(exist_ok=True)


def _check_same(file: Path, identity: dict[str, Any], advice: str) -> None:
    saved = _read(file, "identity", advice)
    try:
        check_identity(saved, identity, str(file.parent))
    except CheckpointError as error:
        raise CheckpointError(f"{error}: use the settings that it was made with, or {advice}") from None


def _read(file: Path, key: str, advice: str) -> Any:
    values = read_object(file, lambda message: CheckpointError(f"{message}; remove it, or {advice}"))
    if key not in values:
        raise CheckpointError(f"{file} is damaged, it has no {key}: remove it, or {advice}")
    return values[key]

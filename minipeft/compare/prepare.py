"""Everything that a comparison checks and decides before a model is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minipeft.compare.data import WINDOW, Task, encode_task, task_hashes, without_long
from minipeft.compare.plan import CompareConfig, Run, Shared, bases_of, train_config
from minipeft.compare.run import RESULT, Order
from minipeft.demo.demo import Cores
from minipeft.demo.exam import row_tokens
from minipeft.files import remove_leftovers, write_text
from minipeft.train.errors import CheckpointError, ConfigError, OutputDirError, as_user_error
from minipeft.train.methods import check_settings
from minipeft.train.models import load_tokenizer, resolve_device, resolve_max_length, text_positions
from minipeft.train.run import check_identity
from minipeft_kernels.arithmetic import arithmetic_dtype

# Beside the runs: what they all share.
COMPARISON, RUNS = "comparison.json", "runs"

# Rows in a step. Packed ones are of 128 tokens, as the demo's.
PACKED_ROWS, SINGLE_ROWS = 2, 8


def check_runs(config: CompareConfig) -> None:
    """Look at all settings that need no model.

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
    """Raise OutputDirError where something else than a comparison lies."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / COMPARISON).is_file():
        raise OutputDirError(f"{folder} is not empty and holds no comparison ({COMPARISON}): choose another --output")


def fit_to_model(config: CompareConfig, task: Task, model: str) -> tuple[Task, Shared]:
    """The task as this model can take it, and what all runs share.

    Raises:
        ModelLoadError: no such model.
        DataError: a text that is too long for the model or one of the methods.
    """
    tokenizer = load_tokenizer(model)
    packing = config.packing if config.packing is not None else config.data is None
    rows = config.batch_size or (PACKED_ROWS if packing else SINGLE_ROWS)
    dtype = config.dtype
    if dtype == "auto":
        # As the demo: emulated bfloat16 would be many times slower than float32.
        dtype = str(arithmetic_dtype(torch.bfloat16, resolve_device(config.device))).removeprefix("torch.")
    shared = Shared(model, 1, 1, packing, rows, config.steps, config.epochs, dtype, config.device)
    max_length = _common_length(config, shared)
    if config.too_long == "drop":
        task = without_long(task, tokenizer, max_length)
    shared = dataclasses.replace(shared, max_length=max_length, window=min(WINDOW, max_length))
    encoded = encode_task(task, tokenizer, shared)
    # What there is and not what there may be: that changes with the methods, and with it nothing else.
    used = min(max_length, row_tokens(encoded.train, encoded.held_out)) if packing else encoded.longest
    return task, dataclasses.replace(shared, max_length=used)


def _common_length(config: CompareConfig, shared: Shared) -> int:
    """One length for all methods, so that all see the same texts: what the one of the most virtual tokens leaves."""
    positions = [text_positions(shared.model, _adapter_config(run, shared)) for run in config.runs]
    (limit, virtual), run = max(zip(positions, config.runs, strict=True), key=lambda pair: pair[0][1])
    try:
        return resolve_max_length(config.max_length, limit, virtual)
    except ConfigError as error:
        raise ConfigError(f"{run.where}: {error}" if virtual else str(error)) from None


def choose_threads(folder: Path, say: Callable[[str], None]) -> int:
    """CPU threads for every run: those that the comparison in `folder` began with, for times that can be compared."""
    if not (folder / COMPARISON).is_file():
        Cores(say).share()
        return torch.get_num_threads()
    return _read(folder / COMPARISON, "threads", "choose another --output")


def make_orders(config: CompareConfig, task: Task, shared: Shared, threads: int) -> list[Order]:
    """What is to be done, the base models first; each with its identity, by which a later call knows it again."""
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
                Order(
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
    """A name for any file system; two names never share one."""
    plain = re.sub(r"[^a-z0-9.]+", "-", run.name).strip(".-")
    if plain != run.name:
        plain += "-" + hashlib.sha256(run.name.encode()).hexdigest()[:8]
    return plain.lstrip("-") if run.is_base else f"{plain.lstrip('-')}-seed{seed}"


def open_folder(folder: Path, task: Task, orders: Sequence[Order]) -> None:
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
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file} is damaged: remove it, or {advice}") from None

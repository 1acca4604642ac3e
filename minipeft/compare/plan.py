"""The plan of a comparison: its runs, each a method with its settings, and the settings that all runs share.

Data, batches, steps and seeds are shared, so that every run takes the same batches in the same order; a run's own are
its method and how that is optimized. Runs come from methods' names, with our defaults, or from a YAML file:

    small: {method: lora, method_args: {r: 4}, lr: 2e-3}
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minipeft.methods import METHODS
from minipeft.train.config import SEED_END, TrainConfig, load_yaml, near_settings, setting_names, usual_name
from minipeft.train.errors import ConfigError
from minipeft.train.methods import method_arguments

# Settings of a run that gives no others.
COMMON: dict[str, Any] = {"scheduler": "cosine", "warmup_ratio": 0.06}


# The settings that a run may have of its own.
OWN_SETTINGS = (
    *("method", "method_args", "quantize", "dtype", "lr", "loraplus_lr_ratio", "optimizer", "optimizer_args"),
    *("scheduler", "scheduler_args", "warmup_steps", "warmup_ratio", "weight_decay", "beta1", "beta2", "eps"),
    *("max_grad_norm", "precision", "gradient_checkpointing"),
)

# The flags of the settings that all runs share, by the names under which a run might give them.
FLAGS = {
    **{name: "--" + name.replace("_", "-") for name in ("model", "data", "eval_data", "other_text", "device")},
    **{name: "--" + name.replace("_", "-") for name in ("max_length", "too_long", "packing", "batch_size", "steps")},
    **{"max_steps": "--steps", "seed": "--seeds", "seeds": "--seeds", "output": "--output", "output_dir": "--output"},
}

EXAMPLE = "small: {method: lora, method_args: {r: 4}, lr: 0.002}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the comparison.

    Attributes:
        name: what the table calls it.
        settings: settings of TrainConfig. Without `method` it is the base model without an adapter.
        where: what errors call it.
    """

    name: str
    settings: Mapping[str, Any]
    where: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", self.where or f"run {self.name!r}")

    @property
    def is_base(self) -> bool:
        """True for the base model without an adapter, where there is nothing to train."""
        return "method" not in self.settings

    @property
    def form(self) -> tuple[str | None, str | None]:
        """`quantize` and `dtype` of the run's base model; None where the run gives none."""
        return self.settings.get("quantize"), self.settings.get("dtype")


def plan_runs(methods: Sequence[str] | None, path: str | Path | None) -> list[Run]:
    """The runs of `methods`, with our defaults, and those of a YAML file; without either, one run of every method that
    has settings for it.

    Raises:
        ConfigError: an unknown method or setting, a name that is there twice, or nothing to compare.
    """
    if methods is None:
        methods = [] if path is not None else [name for name, method in METHODS.items() if method.compare_defaults]
    runs = []
    for name in methods:
        where, given = f"--methods: run {name!r}", {"method": name}
        check_entry(where, name, given)
        runs.append(_run(name, given, where))
    for name, given in (read_entries(path) if path is not None else {}).items():
        runs.append(_run(name, given, f"runs file {path}: run {name!r}"))
    if not runs:
        raise ConfigError("nothing to compare: name at least one method")
    _check_different(runs)
    return runs


def _run(name: str, given: Mapping[str, Any], where: str) -> Run:
    method = given.get("method", name)
    common = COMMON
    if any(key.startswith(("scheduler", "warmup")) for key in given):
        # The user's own schedule may not take a warm-up.
        common = {}
    settings = {**common, **METHODS[method].compare_defaults, **given, "method": method}
    try:
        checked = TrainConfig(model="model", data="data", output_dir="folder", **settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    # Values as TrainConfig converted them: YAML's 2e-3 is a string.
    settings = {key: getattr(checked, key) for key in settings}
    for key, value in METHODS[method].settings.items():
        if key in given and settings[key] != value:
            raise ConfigError(
                f"{where}: method {method} has {key} {value}, got {given[key]!r}: leave it out, or take another method"
            )
        settings[key] = value
    return Run(name, settings, where)


def _check_different(runs: Sequence[Run]) -> None:
    rows = {run.name for run in bases_of(runs)}
    for number, run in enumerate(runs):
        if run.name in rows:
            raise ConfigError(f"{run.where}: this is what the row without an adapter is called: choose another name")
        if run.name in [other.name for other in runs[:number]]:
            raise ConfigError(f"{run.where}: there is another run of this name: runs need different names")


def bases_of(runs: Sequence[Run]) -> list[Run]:
    """Runs of the base model without an adapter, one for each form (4 bits, dtype) in which the runs use it."""
    bases = []
    for quantize, dtype in dict.fromkeys(run.form for run in runs):
        form = ", ".join(part for part in (quantize, dtype) if part)
        bases.append(Run(f"base ({form})" if form else "base", {"quantize": quantize, "dtype": dtype}))
    return bases


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2", or from a count: "3" is 0, 1 and 2; "7," is the seed 7.

    Raises:
        ConfigError: it is neither.
    """
    parts = text.removesuffix(",").split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 and int(part) < SEED_END for part in parts):
        raise ConfigError(f"seeds must be a count or a list such as 0,1,2, got {text!r}")
    numbers = [int(part) for part in parts]
    if "," not in text:
        if not 1 <= numbers[0] <= 1000:
            raise ConfigError(f"seeds must be 1 to 1000 as a count, got {text!r}; for the one seed write {text},")
        return list(range(numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"seeds must differ, got {text!r}")
    return numbers


def parse_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The settings of a comparison.

    Attributes:
        output: folder for everything that it writes; one that holds a comparison is gone on with.
        model, data, eval_data, other_text: see `task.load_task`; without them the demo's.
        packing: several texts in a row; None packs the demo's texts and no others.
        batch_size: rows in a step; None is 2 packed or 8 single ones.
        steps: optimizer steps; None is `epochs` passes over the data.
        max_length: longest text in tokens; None is 1024 or the model's limit.
        too_long: "error" refuses a longer text, "drop" leaves it out.
        dtype: of the base model. "auto" is bfloat16 where the processor multiplies it, else float32.
    """

    output: Path
    runs: Sequence[Run]
    seeds: Sequence[int] = (0,)
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    other_text: str | None = None
    packing: bool | None = None
    batch_size: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    max_length: int | None = None
    too_long: str = "error"
    dtype: str = "auto"
    device: str = "auto"


@dataclasses.dataclass(frozen=True)
class Shared:
    """The settings that all runs have in common.

    Attributes:
        model: directory, hub name or .gguf file.
        max_length: of the texts, or with `packing` the tokens of a row.
        window: tokens of the other text that are seen at once.
        batch_size: texts (rows) in a step.
        dtype: of the base, for runs that do not say.
    """

    model: str
    max_length: int
    window: int
    packing: bool
    batch_size: int
    steps: int | None
    epochs: float
    dtype: str
    device: str


def train_config(run: Run, shared: Shared, seed: int, folder: Path, data: Path) -> TrainConfig:
    """A run's settings as the Trainer takes them.

    Raises:
        ConfigError: a setting is of a wrong type or out of range.
    """
    settings = dict(run.settings)
    settings["dtype"] = settings.get("dtype") or shared.dtype
    return TrainConfig(
        model=shared.model,
        data=str(data),
        output_dir=str(folder),
        device=shared.device,
        max_length=shared.max_length,
        packing=shared.packing,
        batch_size=shared.batch_size,
        max_steps=shared.steps,
        epochs=shared.epochs,
        seed=seed,
        # A log row for every step, from which the time of each is taken.
        log_every=1,
        **settings,
    )


def read_entries(path: str | Path) -> dict[str, dict[str, Any]]:
    """The settings of each run of a YAML file, by the runs' names.

    Raises:
        ConfigError: the file cannot be read, holds no runs, or a name or a setting that a run cannot have.
    """
    what = f"runs file {path}"
    content = load_yaml(path, what)
    if content is None or content == {}:
        raise ConfigError(f"{what} names no run: write one, such as `{EXAMPLE}`")
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else repr(content)
        raise ConfigError(f"{what} must hold a mapping of runs by their names, such as `{EXAMPLE}`, got {kind}")
    if all(key in setting_names() for key in content):
        raise ConfigError(f"{what} holds settings ({', '.join(content)}) and no run's name: write `{EXAMPLE}`")
    for name, given in content.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"{what}: a run's name must be text, got {name!r} (YAML reads numbers, dates, yes, no and null as "
                "such): put the name in quotes"
            )
        check_entry(f"{what}: run {name!r}", name, given)
    return content


def check_entry(where: str, name: str, given: Any) -> None:
    """Raise ConfigError for a run without a name or a method, or with settings that are not a run's."""
    if not name.strip():
        raise ConfigError(f"{where}: a run needs a name, for its row and its folder")
    if not isinstance(given, Mapping):
        got = "nothing" if given is None else repr(given)
        example = f"{{method: {name if name in METHODS else 'lora'}}}"
        raise ConfigError(f"{where} must be a mapping of settings, such as {example}, got {got}")
    method = given.get("method", name)
    for key, value in given.items():
        if key not in OWN_SETTINGS:
            raise ConfigError(f"{where}: {_not_a_runs(key, value, method)}")
    if "method" not in given and name not in METHODS:
        raise ConfigError(f"{where} has no method: add `method:` and one of {', '.join(METHODS)}")
    if not isinstance(method, str) or method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: unknown method {method!r}: known methods are {', '.join(METHODS)}{hint}")


def _not_a_runs(key: Any, value: Any, method: Any) -> str:
    """The reason why a run has no setting `key`, and the place where it may belong."""
    name = usual_name(str(key))
    if name in FLAGS:
        return f"{key!r} is the same for all runs of a comparison: leave it out here, and give {FLAGS[name]}"
    if name not in OWN_SETTINGS and name in setting_names():
        return f"a comparison has no {key!r}: leave it out; a run may set {', '.join(OWN_SETTINGS)}"
    if isinstance(method, str) and method in METHODS and key in method_arguments(method):
        return f"{key!r} is an argument of the method: write method_args: {{{key}: {json.dumps(value, default=str)}}}"
    if isinstance(value, Mapping):
        return f"unknown setting {key!r}: runs stand side by side at the top of the file, such as `{EXAMPLE}`"
    return f"unknown setting {key!r}; {near_settings(str(key), OWN_SETTINGS)}"

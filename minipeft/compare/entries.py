"""A file of runs for a comparison: read, and refused where it says what a run cannot have.

small: {method: lora, method_args: {r: 4}, lr: 2e-3}
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minipeft.train.config import load_yaml, near_settings, setting_names, usual_name
from minipeft.train.errors import ConfigError
from minipeft.train.methods import METHODS, method_arguments

# What a run may set for itself.
OWN_SETTINGS = (
    *("method", "method_args", "quantize", "dtype", "lr", "loraplus_lr_ratio", "optimizer", "optimizer_args"),
    *("scheduler", "scheduler_args", "warmup_steps", "warmup_ratio", "weight_decay", "beta1", "beta2", "eps"),
    *("max_grad_norm", "precision", "gradient_checkpointing"),
)

# Where what all runs share is said, under the names that a run might say it by.
FLAGS = {
    **{name: "--" + name.replace("_", "-") for name in ("model", "data", "eval_data", "other_text", "device")},
    **{name: "--" + name.replace("_", "-") for name in ("max_length", "too_long", "packing", "batch_size", "steps")},
    **{"max_steps": "--steps", "seed": "--seeds", "seeds": "--seeds", "output": "--output", "output_dir": "--output"},
}

EXAMPLE = "small: {method: lora, method_args: {r: 4}, lr: 0.002}"


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
    """Why a run has no setting `key`, and where it may belong."""
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

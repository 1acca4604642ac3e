"""The settings of a training run: one dataclass, filled from a YAML file, then from command-line flags.

Every setting is checked by name and by type before anything is loaded, so that a typo costs a second and
not a training run.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minipeft.methods import METHODS
from minipeft.stored import parse_yaml, shown
from minipeft.train.errors import ConfigError

TOO_LONG_CHOICES = ("error", "drop", "truncate")
TRACKER_CHOICES = ("tensorboard", "wandb", "trackio", "mlflow")
PRECISION_CHOICES = ("none", "bf16")
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE_CHOICES = ("nf4",)
OPTIMIZER_CHOICES = ("adamw", "paged_adamw", "paged_adamw_8bit")
# The settings that a step's memory and time depend on, beside the batch.
STEP_SETTINGS = (
    *("method", "method_args", "adapter", "quantize", "dtype", "precision", "gradient_checkpointing"),
    *("gradient_accumulation", "max_grad_norm"),
)
# Of a path, where systems end.
LONGEST_TEXT = 4096
# The end of the seeds that both torch and numpy take.
SEED_END = 2**63
# transformers' schedules, but for reduce_lr_on_plateau and greedy: those step on a metric, not on the step
# number, so the settings would not decide the learning rates.
SCHEDULER_CHOICES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


def _setting(
    help: str,
    default: Any = dataclasses.MISSING,
    choices: tuple[str, ...] | None = None,
    known: Iterable[str] | None = None,
) -> Any:
    """A field of `TrainConfig`. `choices` are checked; `known` values are listed in the flag's help alone."""
    metadata = {"help": help, "choices": choices, "known": known}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that defines a run. `Trainer` reads it; the CLI also reads the first block.

    Raises:
        ConfigError: on a wrong type or a value out of range, naming the setting.
    """

    # The model, the data, the method, and the place of the results.
    model: str = _setting("model directory, hub name, or .gguf file")
    data: str = _setting(
        "training records: a file (.jsonl, .json, .csv, .tsv, .parquet; .gz), a folder, or a hub's data set; several "
        "with commas between them, each with its share after a colon, such as a.jsonl:2,b.csv"
    )
    output_dir: str = _setting("directory for checkpoints, logs and the adapter")
    method: str = _setting("fine-tuning method", "lora", known=METHODS)
    method_args: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "arguments of the method's config, such as {r: 8}; LoRA's target_modules is all-linear unless "
            "given: all linear layers and a mixture's experts, never its routers"
        },
    )
    adapter: str | None = _setting("directory of an adapter to train further, by its own settings", None)
    quantize: str | None = _setting("quantize the base model", None, QUANTIZE_CHOICES)
    dtype: str = _setting("dtype the base model is loaded in", "auto", DTYPE_CHOICES)
    device: str = _setting("auto, cpu, cuda or cuda:N", "auto")
    eval_data: str | None = _setting("evaluation records, in the formats of data", None)
    eval_fraction: float = _setting("share of the training records held out for evaluation", 0.0)

    # From records to batches.
    chat_template: str | None = _setting("file with a chat template to use in the tokenizer's place", None)
    max_length: int | None = _setting("longest sequence in tokens (default: 1024 or the model's limit)", None)
    too_long: str = _setting("what to do with longer records", "error", TOO_LONG_CHOICES)
    packing: bool = _setting("pack several records into a row, each isolated from the others", False)
    batch_size: int = _setting("rows in a micro-batch, of each process", 8)
    gradient_accumulation: int = _setting("micro-batches in an optimizer step, of each process", 1)
    fsdp: bool = _setting("give each process a part of the model alone, by FSDP2 (torchrun)", False)
    process_timeout: float = _setting("seconds that processes wait for one another (torchrun)", 600.0)

    # Optimization.
    epochs: float = _setting("passes over the data (ignored when max_steps is given)", 1.0)
    max_steps: int | None = _setting("optimizer steps", None)
    optimizer: str = _setting("torch's AdamW, or ours with its state paged", "adamw", OPTIMIZER_CHOICES)
    optimizer_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "memory of a paged optimizer, such as {host_budget: 1e9, spill_dir: d}"}
    )
    lr: float = _setting("peak learning rate", 2e-4)
    loraplus_lr_ratio: float | None = _setting("LoRA+: the factors B learn at lr times this, such as 16", None)
    scheduler: str = _setting("learning-rate schedule, by transformers' name", "linear", SCHEDULER_CHOICES)
    scheduler_args: dict[str, Any] = field(default_factory=dict, metadata={"help": "extra arguments of the schedule"})
    warmup_steps: int | None = _setting("steps of linear warm-up", None)
    warmup_ratio: float = _setting("warm-up as a share of all steps (when warmup_steps is not given)", 0.0)
    weight_decay: float = _setting("AdamW weight decay, on matrices only", 0.0)
    beta1: float = _setting("AdamW beta1", 0.9)
    beta2: float = _setting("AdamW beta2", 0.999)
    eps: float = _setting("AdamW epsilon", 1e-8)
    max_grad_norm: float | None = _setting("clip the gradient to this norm (null: do not)", 1.0)
    precision: str = _setting("autocast of the forward pass", "none", PRECISION_CHOICES)
    gradient_checkpointing: bool = _setting("recompute activations in backward to save memory", False)
    seed: int = _setting("seed of data order and dropout", 0)

    # Evaluating, saving and logging.
    eval_every: int | None = _setting("evaluate every N steps (default: at the end only)", None)
    eval_batch_size: int | None = _setting("rows in an evaluation batch (default: batch_size)", None)
    eval_at_start: bool = _setting("evaluate once before the first step", False)
    save_every: int | None = _setting("save a checkpoint every N steps (default: at the end only)", None)
    keep_last: int | None = _setting("keep only the newest N checkpoints (null: all)", 2)
    log_every: int = _setting("write a log row every N steps", 10)
    report_to: str | None = _setting(
        "trackers that are told of the run, several with commas between them", None, known=("none", *TRACKER_CHOICES)
    )
    tensorboard: bool = _setting("write TensorBoard events to output_dir/tensorboard (as report_to does)", False)
    push_to_hub: str | None = _setting("org/name on the hub where the adapter is put at the end, privately", None)
    page: bool = _setting("write the run as one HTML page, output_dir/report.html, at the end", False)
    plot: bool = _setting("draw output_dir/loss_curve.png at the end", False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            setattr(self, f.name, _checked(f.name, getattr(self, f.name), hints[f.name]))
            _check_choice(f.name, getattr(self, f.name), f.metadata.get("choices"))
        _check_ranges(self)

    @classmethod
    def from_sources(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """Build a config from a YAML file and overrides, which win.

        Args:
            path: YAML file holding a mapping of settings, or None.
            overrides: settings by name. A value of None means "not given" and is skipped, so that an argparse
                namespace can be passed as `vars(args)` once it holds only settings.

        Raises:
            ConfigError: unreadable file, unknown setting (with the nearest names), missing setting,
                wrong type.
        """
        values = {} if path is None else _read_settings(path)
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        _check_names(values, where=str(path))
        _check_names(given, where="command line")
        merged = {**values, **given}
        missing = [name for name in required_settings() if merged.get(name) is None]
        where = "" if path is None else f"config file {path}: "
        if missing:
            raise ConfigError(f"{where}missing setting(s): {', '.join(missing)}")
        try:
            return cls(**merged)
        except ConfigError as error:
            # What a flag says is not the file's fault.
            mine = any(repr(name) in str(error) for name in given)
            raise error if mine else ConfigError(f"{where}{error}") from None

    def trackers(self) -> list[str]:
        """The trackers of `report_to`, and TensorBoard where `tensorboard` asks for it."""
        names = [name.strip() for name in (self.report_to or "").split(",")]
        names += ["tensorboard"] if self.tensorboard else []
        return [name for name in dict.fromkeys(names) if name not in ("", "none")]

    def to_dict(self) -> dict[str, Any]:
        """Settings by name, JSON-serializable."""
        return dataclasses.asdict(self)


def required_settings() -> list[str]:
    """Names of the settings without a default."""
    no_default = dataclasses.MISSING
    return [
        f.name for f in dataclasses.fields(TrainConfig) if f.default is no_default and f.default_factory is no_default
    ]


def _read_settings(path: str | Path) -> dict[str, Any]:
    """A YAML file's settings; an empty one holds none."""
    content = load_yaml(path, f"config file {path}")
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"config file {path} must hold a mapping of settings, such as `lr: 0.0002`")
    return content


# Other trainers' names of our settings, where the two are too different for a search by spelling.
_ALIASES = {
    "learning_rate": "lr",
    "lr_scheduler_type": "scheduler",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "save_total_limit": "keep_last",
    "adam_epsilon": "eps",
    "optim": "optimizer",
    "bf16": "precision",
}


def _check_names(values: Mapping[str, Any], where: str) -> None:
    known = setting_names()
    for name in values:
        if name not in known:
            typo = difflib.get_close_matches(usual_name(name), known, cutoff=0.8)
            hint = "" if typo else " (what a method takes stands in method_args)"
            raise ConfigError(f"{where}: unknown setting {name!r}; {near_settings(name, known)}{hint}")


def setting_names() -> list[str]:
    """The names of all settings."""
    return [f.name for f in dataclasses.fields(TrainConfig)]


def usual_name(name: str) -> str:
    """The name of the setting that other trainers call `name`; `name` itself where they have none."""
    plain = name.replace("-", "_")
    return _ALIASES.get(plain, plain)


def near_settings(name: str, known: Sequence[str]) -> str:
    """The end of an error on an unknown setting `name`: the near names in `known`, or all of them."""
    usual = usual_name(name)
    near = [usual] if usual in known else difflib.get_close_matches(usual, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known settings: {', '.join(known)}"


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or ConfigError. Strings are converted, for flags and for YAML's `1e-4`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    target = typing.get_origin(target) or target
    optional = " or null" if type(None) in options else ""
    if isinstance(value, str) and target is not str:
        if optional and value.lower() in ("none", "null"):
            return None
        value = _from_string(value, target)
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"setting {name!r} must be a number, got one that is too large") from None
    wrong_bool = isinstance(value, bool) and target is not bool
    if wrong_bool or not isinstance(value, target):
        kind = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}
        expected = kind.get(target, "a string") + optional
        raise ConfigError(f"setting {name!r} must be {expected}, got {shown(value)}")
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise ConfigError(f"setting {name!r} must have at most {LONGEST_TEXT:,} characters, got {shown(value)}")
    if target is dict:
        _check_plain(name, value)
    return value


def _check_plain(name: str, value: dict[Any, Any]) -> None:
    """Raise ConfigError for a mapping that no run's description could hold, such as one with a YAML set in it."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"setting {name!r} must hold text, numbers, lists and mappings alone: {error}") from None


def _from_string(text: str, target: type) -> Any:
    """`text` as `target` where that is what it says; else `text` itself, for the caller to refuse."""
    # PyYAML reads YAML 1.1, in which 1e-4 (no dot) is a string; float() takes it.
    if target in (int, float):
        try:
            return target(text)
        except ValueError:
            return text
    try:
        parsed = parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text
    return parsed if isinstance(parsed, target) else text


def _check_choice(name: str, value: Any, choices: tuple[str, ...] | None) -> None:
    if choices and value is not None and value not in choices:
        raise ConfigError(f"setting {name!r} must be one of {', '.join(choices)}, got {shown(value)}")


_POSITIVE: tuple[str, ...] = (
    *("max_length", "batch_size", "gradient_accumulation", "epochs", "max_steps", "eps", "max_grad_norm"),
    *("eval_every", "eval_batch_size", "save_every", "keep_last", "log_every", "loraplus_lr_ratio"),
)


def _check_ranges(config: TrainConfig) -> None:
    for name in _POSITIVE:
        _require(config, name, lambda v: v > 0, "greater than 0")
    for name in ("lr", "weight_decay", "warmup_steps"):
        _require(config, name, lambda v: v >= 0, "0 or greater")
    _require(config, "seed", lambda v: 0 <= v < SEED_END, "0 or greater and below 2**63")
    for name in required_settings():
        if not getattr(config, name):
            raise ConfigError(f"setting {name!r} must not be empty")
    for name in ("beta1", "beta2", "eval_fraction", "warmup_ratio"):
        _require(config, name, lambda v: 0 <= v < 1, "in [0, 1)")
    if config.eval_data is not None and config.eval_fraction > 0:
        raise ConfigError("settings 'eval_data' and 'eval_fraction' exclude each other: give one of them")
    if config.fsdp and config.optimizer == "paged_adamw_8bit":
        raise ConfigError(
            "setting 'fsdp' leaves each process a part of every tensor, and 8-bit state takes whole ones: "
            "set optimizer to paged_adamw or adamw"
        )
    if config.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.push_to_hub):
        raise ConfigError(f"setting 'push_to_hub' must be a name like org/name, got {shown(config.push_to_hub)}")
    for name in config.trackers():
        _check_choice("report_to", name, TRACKER_CHOICES)
    if config.scheduler == "constant" and (config.warmup_steps or config.warmup_ratio):
        raise ConfigError("setting 'scheduler' constant has no warm-up: choose constant_with_warmup")
    if config.scheduler.startswith("constant") and config.scheduler_args:
        raise ConfigError(f"setting 'scheduler' {config.scheduler} takes no scheduler_args")


def _require(config: TrainConfig, name: str, holds: typing.Callable[[Any], bool], rule: str) -> None:
    value = getattr(config, name)
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"setting {name!r} must be finite and {rule}, got {shown(value)}")
    if not holds(value):
        raise ConfigError(f"setting {name!r} must be {rule}, got {shown(value)}")


def add_config_arguments(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    """Add a `--flag` for every setting, each defaulting to None ("not given").

    Booleans become `--packing / --no-packing`; mappings are written in YAML: `--method-args '{r: 8}'`.
    Values arrive as strings and are converted by `TrainConfig`, so that its errors name the setting.
    """
    hints = typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        if f.name in skip:
            continue
        flag, choices = "--" + f.name.replace("_", "-"), f.metadata.get("choices") or f.metadata.get("known")
        text = f.metadata["help"] + (f" ({'|'.join(choices)})" if choices else "") + _default_text(f)
        if hints[f.name] is bool:
            parser.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, dest=f.name, default=None, help=text.replace("%", "%%"))


def _default_text(f: dataclasses.Field[Any]) -> str:
    """The end of a flag's help: its default, unless there is none or the help names it."""
    if f.default is dataclasses.MISSING or f.default is None or "default" in f.metadata["help"]:
        return ""
    words = {True: "yes", False: "no"}
    return f" (default: {words[f.default] if isinstance(f.default, bool) else f.default})"


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """The settings among parsed arguments, for `TrainConfig.from_sources(overrides=...)`."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which yaml would drop the first in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a YAML node; ConstructorError for a key that is given twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load_yaml(path: str | Path, what: str) -> Any:
    """The content of a YAML file that a user wrote, read strictly; None for an empty file.

    Args:
        what: the file's name in errors.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, or a key given twice.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {what}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{what}{place}: not valid YAML: {_problem(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        # Also a number of too many digits, or a date that does not exist.
        raise ConfigError(f"{what} holds a value that cannot be read: {error}") from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    return ": ".join(part for part in (error.context, error.problem) if part)

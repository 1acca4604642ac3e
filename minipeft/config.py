"""Adapter configurations: what PEFT calls `adapter_config.json`, in Python and on disk.

A method's config is a dataclass with PEFT's field names and defaults (checked against PEFT 0.21.2). Fields that
ask for something minipeft does not have are kept, so that a file written by either library reads in the other;
any value but their neutral one raises and names the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from minipeft.files import write_text

CONFIG_NAME = "adapter_config.json"

# The PEFT release whose fields, names and file format the configs follow; written as `peft_version`.
PEFT_FORMAT = "0.21.2"

ConfigClass = TypeVar("ConfigClass", bound=type)


class PeftType(str, enum.Enum):
    """The methods that minipeft has, under PEFT's names where PEFT has them."""

    LORA = "LORA"
    BOTTLENECK = "BOTTLENECK"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"


class TaskType(str, enum.Enum):
    """What the model is for. It decides which head modules are trained and saved whole, besides the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_CONFIG_OF_METHOD: dict[PeftType, Any] = {}

# Whose import registers a config class: a config may be read before any method is used.
_HOMES = ("minipeft.lora.config", "minipeft.bottleneck.config", "minipeft.virtual.prefix", "minipeft.virtual.prompt")


def register_method(peft_type: PeftType) -> Callable[[ConfigClass], ConfigClass]:
    """Class decorator: the config class that `peft_type` reads its JSON with."""

    def register(config_class: ConfigClass) -> ConfigClass:
        _CONFIG_OF_METHOD[peft_type] = config_class
        return config_class

    return register


@dataclasses.dataclass
class PeftConfig:
    """What every method's configuration has (PEFT's `PeftConfig`).

    Raises ValueError for a field value that asks for something minipeft lacks, and for an unknown `task_type`.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # Whether an adapter of this method can be folded into the base weights.
    mergeable: ClassVar[bool] = False
    # What the names of modules start with in the adapter's file.
    key_prefix: ClassVar[str] = "base_model.model."
    # Field -> the values under which it asks for nothing. Filled in by each method.
    unsupported: ClassVar[Mapping[str, tuple]] = {}

    def __post_init__(self) -> None:
        self.task_type = _enum(TaskType, self.task_type, "task_type")
        own_type = _type_of(type(self))
        if self.peft_type is not None and _enum(PeftType, self.peft_type, "peft_type") is not own_type:
            raise ValueError(
                f"{type(self).__name__} is for peft_type {own_type and own_type.value!r}, got {self.peft_type!r}"
            )
        self.peft_type = own_type
        for field in self._asked_in_vain(vars(self)):
            raise ValueError(
                f"{type(self).__name__}({field}={getattr(self, field)!r}) is not supported by minipeft; "
                f"leave {field} at its default ({getattr(type(self), field, None)!r})"
            )

    @classmethod
    def _asked_in_vain(cls, values: Mapping[str, Any]) -> list[str]:
        """The fields of `values` that ask for something minipeft does not have."""
        asking = {field: values[field] for field in cls.unsupported if not _asks_for_nothing(values.get(field))}
        return [field for field, value in asking.items() if value not in cls.unsupported[field]]

    def check_start(self) -> None:
        """Raise ValueError if an adapter of this config can be loaded, but not made anew."""

    def file_marks(self) -> dict[str, str]:
        """What the adapter's file of tensors says about itself, for `check_marks`."""
        return {}

    def check_marks(self, marks: Mapping[str, str], source: str) -> None:
        """Raise ValueError if a file with these marks cannot be read with this config.

        Args:
            source: Names it in errors.
        """

    def for_loading(self, trainable: bool, training_file: bool) -> None:
        """Get ready to describe an adapter that is loaded.

        Args:
            trainable: Whether it will be trained.
            training_file: Whether there are tensors that are for training alone beside it.
        """
        self.inference_mode = not trainable

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method gives the model virtual tokens."""
        return self.peft_type in (PeftType.PREFIX_TUNING, PeftType.PROMPT_TUNING)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json`, whole or not at all, to a folder, which is made if there is none."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        values = {**self.to_dict(), "peft_version": self.peft_version or PEFT_FORMAT}
        write_text(Path(save_directory) / CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values: enums as their strings, sets as sorted lists."""
        return {f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "adapter configuration") -> PeftConfig:
        """The config that `values` describes, of the class that its `peft_type` names.

        Fields that this version does not know pass when they ask for nothing (null, false or empty): newer PEFT
        versions write them for features that are off.

        Raises ValueError naming the field and `source` otherwise.
        """
        config_class = _class_of(values, source) if _type_of(cls) is None else cls
        known = {f.name for f in dataclasses.fields(config_class)}
        for field, value in values.items():
            if field not in known and not _asks_for_nothing(value):
                near = difflib.get_close_matches(field, known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"{source}: field {field!r} = {value!r} is not known to minipeft{hint}")
        for field in config_class._asked_in_vain(values):
            raise ValueError(
                f"{source}: the adapter was made with {field}={values[field]!r}, which minipeft does not have: use it "
                f"with PEFT, or train one without {field}"
            )
        try:
            return config_class(**{k: v for k, v in values.items() if k in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> PeftConfig:
        """Read `adapter_config.json` from an adapter directory.

        Raises FileNotFoundError when there is none, ValueError when it cannot be used.
        """
        file = Path(path) / (kwargs.pop("subfolder", None) or "") / CONFIG_NAME
        # How to reach a hub: adapters are read from folders.
        unknown = kwargs.keys() - {"revision", "token", "cache_dir", "local_files_only", "force_download"}
        if unknown:
            raise TypeError(f"PeftConfig.from_pretrained does not take {sorted(unknown)}")
        if not file.is_file():
            raise FileNotFoundError(f"no adapter at {str(file.parent)!r}: expected a file {CONFIG_NAME}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values, source=str(file))


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config object for a dictionary with a `peft_type` and that method's fields (PEFT's function)."""
    return PeftConfig.from_dict(config_dict)


def _type_of(config_class: type[PeftConfig]) -> PeftType | None:
    return next((t for t, c in _CONFIG_OF_METHOD.items() if issubclass(config_class, c)), None)


def _class_of(values: Mapping[str, Any], source: str) -> type[PeftConfig]:
    for home in _HOMES:
        importlib.import_module(home)
    name = values.get("peft_type")
    if name not in [t.value for t in _CONFIG_OF_METHOD]:
        known = ", ".join(t.value for t in _CONFIG_OF_METHOD)
        raise ValueError(f"{source}: peft_type {name!r} is not a method that minipeft has ({known})")
    return _CONFIG_OF_METHOD[PeftType(name)]


def _enum(kind: type[enum.Enum], value: Any, field: str) -> Any:
    if value is None or isinstance(value, kind):
        return value
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{field} must be one of {[m.value for m in kind]}, got {value!r}") from None


def _asks_for_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | dict | str | tuple | set) and not value)


def _to_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value

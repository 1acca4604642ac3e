"""Adapter configurations: the contents of PEFT's `adapter_config.json`, in Python and on disk.

A method's config is a dataclass with PEFT's field names and defaults (checked against PEFT 0.21.2). Fields that
ask for something minipeft does not have are kept, so that a file written by either library reads in the other;
any value but their neutral one raises and names the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from minipeft.files import write_text
from minipeft.methods import METHODS, method_of, type_of
from minipeft.public import PEFT_VERSION, attributes_of

CONFIG_NAME = "adapter_config.json"

# The names that PEFT's module of this name has besides.
__getattr__, __dir__ = attributes_of("config")


class PeftType(str, enum.Enum):
    """minipeft's own methods, under PEFT's names where PEFT has them. Others go by the name they register."""

    LORA = "LORA"
    BOTTLENECK = "BOTTLENECK"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"


class TaskType(str, enum.Enum):
    """The task of the model. It decides which head modules are trained and saved whole, besides the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclasses.dataclass
class PeftConfig:
    """The fields of every method's configuration (PEFT's `PeftConfig`), and the verbs that a method may override.

    Raises ValueError for a field value that asks for something minipeft lacks, and for an unknown `task_type`.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # True if an adapter of this method can be folded into the base weights.
    mergeable: ClassVar[bool] = False
    # True if the method gives the model virtual tokens (PEFT's word for that).
    is_prompt_learning: ClassVar[bool] = False
    # The first part of every tensor's name in the adapter's file, before the module's name.
    key_prefix: ClassVar[str] = "base_model.model."
    # Fields that minipeft lacks -> the values that ask for nothing. Filled in by each method.
    unsupported: ClassVar[Mapping[str, tuple]] = {}

    def __post_init__(self) -> None:
        self.task_type = _enum(TaskType, self.task_type, "task_type")
        own_type = _as_peft_type(type_of(type(self)))
        if self.peft_type is not None and _as_peft_type(self.peft_type) != own_type:
            known = [*dict.fromkeys(method.peft_type for method in METHODS.values())]
            if self.peft_type not in known:
                raise ValueError(f"peft_type must be one of {known}, got {self.peft_type!r}")
            raise ValueError(f"{type(self).__name__} is for peft_type {_name(own_type)!r}, got {self.peft_type!r}")
        self.peft_type = own_type
        for field in self._unsupported_fields(vars(self)):
            raise ValueError(
                f"{type(self).__name__}({field}={getattr(self, field)!r}) is not supported by minipeft; "
                f"leave {field} at its default ({getattr(type(self), field, None)!r})"
            )

    @property
    def type_name(self) -> str | None:
        """`peft_type` as the string that files hold."""
        return _name(self.peft_type)

    @classmethod
    def _unsupported_fields(cls, values: Mapping[str, Any]) -> list[str]:
        """The fields of `values` that ask for something minipeft does not have."""
        asking = {field: values[field] for field in cls.unsupported if not _is_neutral(values.get(field))}
        return [field for field, value in asking.items() if value not in cls.unsupported[field]]

    # Verbs that a method may answer in its own way.

    @classmethod
    def completed(cls, arguments: Mapping[str, Any], model: str) -> dict[str, Any]:
        """The arguments that a user gave `minipeft train`, with those that follow from them.

        Args:
            model: Directory or hub name of the base model.
        """
        return dict(arguments)

    def check_start(self) -> None:
        """Raise ValueError if an adapter of this config can be loaded, but not made anew."""

    def fields_of_training(self) -> set[str]:
        """The fields that matter in training alone: an adapter with given tensors computes the same without them."""
        return {
            *("inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type"),
            *("target_modules", "exclude_modules"),
        }

    def positions_taken(self, model_type: str) -> int:
        """The number of the model's positions that the adapter takes away from the text.

        Args:
            model_type: transformers' `config.model_type` of the base model's text part.
        """
        return 0

    def file_marks(self) -> dict[str, str]:
        """The metadata of the adapter's file of tensors, for `check_marks`."""
        return {}

    def check_marks(self, marks: Mapping[str, str], source: str) -> None:
        """Raise ValueError if a file with these marks cannot be read with this config.

        Args:
            source: Names it in errors.
        """

    def saving_notice(self) -> str | None:
        """A sentence that warns the user who saves such an adapter, if there is something to say."""
        return None

    def plain(self) -> PeftConfig:
        """The config of the plain adapter that acts alike on the base model itself (`AdapterModule.plain_state`).

        Raises ValueError when the adapter starts from nothing but the base model as it is.
        """
        raise ValueError(
            "path_initial_model_for_weight_conversion makes PiSSA adapters plain LoRA; this one has "
            f"init_lora_weights={getattr(self, 'init_lora_weights', None)!r}"
        )

    def for_loading(self, trainable: bool, training_file: bool) -> None:
        """Get ready to describe an adapter that is loaded.

        Args:
            trainable: True if it will be trained.
            training_file: True if there are tensors that are for training alone beside it.
        """
        self.inference_mode = not trainable

    # Files

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json`, whole or not at all, to a folder, which is made if there is none."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        values = {**self.to_dict(), "peft_version": self.peft_version or PEFT_VERSION}
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
        config_class = _class_of(values, source) if type_of(cls) is None else cls
        known = {f.name for f in dataclasses.fields(config_class)}
        for field, value in values.items():
            if field not in known and not _is_neutral(value):
                near = difflib.get_close_matches(field, known, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise ValueError(f"{source}: field {field!r} = {value!r} is not known to minipeft{hint}")
        for field in config_class._unsupported_fields(values):
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
        # These arguments say how to reach a hub; adapters are read from folders.
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


def _class_of(values: Mapping[str, Any], source: str) -> type[PeftConfig]:
    name = values.get("peft_type")
    try:
        config_class: type[PeftConfig] = method_of(str(_name(name))).load("config")
    except KeyError:
        known = ", ".join(dict.fromkeys(method.peft_type for method in METHODS.values()))
        raise ValueError(f"{source}: peft_type {name!r} is not a method that minipeft has ({known})") from None
    return config_class


def _as_peft_type(name: Any) -> Any:
    """The member of `PeftType` called `name`, or `name` itself."""
    return PeftType(name) if name in [kind.value for kind in PeftType] else name


def _name(peft_type: Any) -> str | None:
    return peft_type.value if isinstance(peft_type, enum.Enum) else peft_type


def _enum(kind: type[enum.Enum], value: Any, field: str) -> Any:
    if value is None or isinstance(value, kind):
        return value
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{field} must be one of {[m.value for m in kind]}, got {value!r}") from None


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | dict | str | tuple | set) and not value)


def _to_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value

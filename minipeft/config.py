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
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from minipeft.beside_peft import KnownToPeft
from minipeft.errors import AdapterNotFoundError, NotAnAdapterError, PeftWarning
from minipeft.files import write_text
from minipeft.hub import HUB_ARGUMENTS, adapter_folder
from minipeft.methods import METHODS, method_of, type_of
from minipeft.public import PEFT_VERSION as __version__
from minipeft.public import attributes_of
from minipeft.stored import brief, check_fields, read_object, shown

CONFIG_NAME = "adapter_config.json"

# The names that PEFT's module of this name has besides.
__getattr__, __dir__ = attributes_of("config")


class PeftType(str, enum.Enum):
    """minipeft's own methods, under PEFT's names where PEFT has them. Others go by the name they register."""

    LORA = "LORA"
    BOTTLENECK = "BOTTLENECK"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"


class TaskType(str, enum.Enum):
    """The task of the model. It decides which head modules are trained and saved whole, besides the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclasses.dataclass
class PeftConfig(KnownToPeft):
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

    peft_root: ClassVar[str] = "PeftConfig"
    # True if an adapter of this method can be folded into the base weights.
    mergeable: ClassVar[bool] = False
    # True if the method gives the model virtual tokens (PEFT's word for that).
    is_prompt_learning: ClassVar[bool] = False
    # The first part of every tensor's name in the adapter's file, before the module's name.
    key_prefix: ClassVar[str] = "base_model.model."
    # Fields that minipeft lacks -> the values that ask for nothing. Filled in by each method.
    unsupported: ClassVar[Mapping[str, tuple]] = {}

    def __post_init__(self) -> None:
        self.task_type = _as_task_type(self.task_type)
        own_type = _as_peft_type(type_of(type(self)))
        if self.peft_type is not None and _as_peft_type(self.peft_type) != own_type:
            warnings.warn(
                f"{type(self).__name__} is for peft_type {_name(own_type)!r}; the given {_name(self.peft_type)!r} is "
                "ignored",
                PeftWarning,
                stacklevel=3,
            )
        self.peft_type = own_type
        self.peft_version = self.peft_version or __version__
        for field in self._unsupported_fields(vars(self)):
            raise ValueError(
                f"{type(self).__name__}({field}={getattr(self, field)!r}) is not supported by minipeft; "
                f"leave {field} at its default ({getattr(type(self), field, None)!r})"
            )

    @property
    def is_adaption_prompt(self) -> bool:
        """False: PEFT's adaption prompt is no method of minipeft's."""
        return False

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

    def reshape(self, model: Any) -> Callable[[], None]:
        """Change the base model as the config asks for, before the adapter is attached. Returns: what undoes it."""
        return lambda: None

    def own_mixin(self, module: Any) -> Any:
        """The mixin that the user wants for `module` in the place of the method's; None for the method's."""
        return None

    def fields_of_training(self) -> set[str]:
        """The fields that matter in training alone: an adapter with given tensors computes the same without them."""
        return {
            *("inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type"),
            *("target_modules", "exclude_modules", "modules_to_save"),
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
        write_text(Path(save_directory) / CONFIG_NAME, json.dumps(self.to_dict(), indent=2, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values: enums as their strings, sets as sorted lists."""
        return {f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "adapter configuration") -> PeftConfig:
        """The config that `values` describes, of the class that its `peft_type` names; of this class if none is named.

        Fields that this version does not know pass when they ask for nothing (null, false or empty): newer PEFT
        versions write them for features that are off. Of others a warning says that they are ignored, as in PEFT.

        Raises NotAnAdapterError, a TypeError, when nothing says which method it is; ValueError naming the field and
            `source` for one that asks for what minipeft does not have, or is out of range.
        """
        config_class: type[PeftConfig] = cls if values.get("peft_type") is None else _class_of(values, source)
        known = {f.name for f in dataclasses.fields(config_class)}
        unknown = sorted(field for field, value in values.items() if field not in known and not _is_neutral(value))
        if values.get("peft_type") is None and (unknown or type_of(cls) is None):
            raise NotAnAdapterError(
                f"{source}: The {cls.__name__} config that is trying to be loaded is missing required keys: "
                "{'peft_type'}."
            )
        if unknown:
            near = {field: difflib.get_close_matches(field, known, n=1) for field in unknown}
            hints = [f"{field!r} may mean {names[0]!r}" for field, names in near.items() if names]
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {config_class.__name__}, these are ignored. "
                f"{source} asks for what PEFT {__version__} does not know; the adapter may not act as it was trained"
                + "".join(f"; {hint}" for hint in hints),
                PeftWarning,
                stacklevel=3,
            )
        for field in config_class._unsupported_fields(values):
            raise ValueError(
                f"{source}: the adapter was made with {field}={shown(values[field])}, which minipeft does not have: "
                f"use it with PEFT, or train one without {field}"
            )
        check_fields(values, config_class, source)
        try:
            return config_class(**{k: v for k, v in values.items() if k in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {brief(str(error))}") from error

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The config with these fields, of the class that `peft_type` names; of this class if it is not given.

        Raises TypeError for an unknown field, ValueError for an unknown `peft_type` or a value out of range.
        """
        config_class = cls if kwargs.get("peft_type") is None else _class_of(kwargs, "from_peft_type")
        return config_class(**kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The given fields, as they are: values are checked when a config is made of them."""
        return kwargs

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The fields in a file such as `adapter_config.json`, as a dictionary. Raises ValueError for another file."""
        values = read_object(path_json_file)
        # No file of PEFT's has it: it is about one run, not about the adapter.
        values.pop("runtime_config", None)
        return values

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str | None = None, **kwargs: Any) -> PeftConfig:
        """Read `adapter_config.json` of an adapter's folder, or of a name on the hub.

        Args:
            kwargs: `hub.HUB_ARGUMENTS`.

        Raises AdapterNotFoundError, a FileNotFoundError, when there is none, ValueError when it cannot be used.
        """
        if unknown := kwargs.keys() - set(HUB_ARGUMENTS):
            raise TypeError(f"PeftConfig.from_pretrained does not take {sorted(unknown)}")
        file = adapter_folder(path, [CONFIG_NAME], (), subfolder, **kwargs) / CONFIG_NAME
        if not file.is_file():
            raise AdapterNotFoundError(f"no adapter at {str(file.parent)!r}: Can't find '{CONFIG_NAME}' there")
        return cls.from_dict(cls.from_json_file(file), source=str(file))


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """True if there is an adapter that minipeft can use in this folder, or under this name on the hub."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (OSError, TypeError, ValueError):
        return False
    return True


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config object for a dictionary with a `peft_type` and that method's fields (PEFT's function)."""
    return PeftConfig.from_dict(config_dict)


def _class_of(values: Mapping[str, Any], source: str) -> type[PeftConfig]:
    name = values.get("peft_type")
    try:
        config_class: type[PeftConfig] = method_of(str(_name(name))).load("config")
    except KeyError:
        known = ", ".join(dict.fromkeys(method.peft_type for method in METHODS.values()))
        raise ValueError(f"{source}: peft_type {shown(name)} is not a method that minipeft has ({known})") from None
    return config_class


def _as_peft_type(name: Any) -> Any:
    """The member of `PeftType` called `name`, or `name` itself."""
    return PeftType(name) if name in [kind.value for kind in PeftType] else name


def _name(peft_type: Any) -> str | None:
    return peft_type.value if isinstance(peft_type, enum.Enum) else peft_type


def _as_task_type(value: Any) -> TaskType | None:
    if value is None or isinstance(value, TaskType):
        return value
    try:
        return TaskType(value)
    except ValueError:
        known = ", ".join(kind.value for kind in TaskType)
        raise ValueError(f"Invalid task type: {value!r}. Must be one of the following task types: {known}.") from None


def _is_neutral(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | dict | str | tuple | set) and not value)


def _to_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value

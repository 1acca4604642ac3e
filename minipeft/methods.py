"""The one table of fine-tuning methods: under each name, all that the rest of minipeft needs to know of the method.

The core imports no method. A method's package describes it in a `Registration`, and the core, `minipeft train` and
`minipeft compare` look it up here. Classes and functions are given as import strings ("package.module:name"), so that
the table is read without importing torch.

A method outside minipeft calls `register`. For the command line to find it, its package names a function without
arguments that makes this call as an entry point of the group "minipeft.methods".
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# The packages of minipeft's own methods, each with a tuple METHODS, in the order in which users see them listed.
ROOMS = ("minipeft.lora", "minipeft.bottleneck", "minipeft.virtual", "minipeft.tokens")
ENTRY_POINTS = "minipeft.methods"


@dataclasses.dataclass(frozen=True)
class Registration:
    """All that minipeft knows of one method. Whatever is not plain data is an import string, or the object itself.

    Attributes:
        name: The method's name on the command line.
        peft_type: Its name in `adapter_config.json`. Several names may stand for one type ("lora" and "qlora").
        config: The subclass of `PeftConfig`.
        attach: The `minipeft.adapter.Method` that says which modules an adapter goes to.
        train_defaults: Fields of the config that `minipeft train` sets unless told otherwise.
        settings: Settings of a run that the name implies, such as qlora's quantization.
        compare_defaults: Settings of a run of `minipeft compare`, such as lr and method_args.
        trains: (model, config) -> None: what `minipeft train` makes of a new adapter's config, once it has the model.
        start: (model, token ids) -> a notice for the user or None: gives a new adapter a start from the training data.
        rows: (adapter, config) -> None: ValueError for one that cannot act on some rows; without it none can.
        names: (model, config) -> None: puts what a new adapter's config calls by a name of former times under today's.
        files: (model, config, tensors by name) -> the tensors that a file of former times stands for; fits the config.
        combine: (model, adapters, weights, name, ...): adds an adapter made of others.
        prefix: The start of the names of its tensors (PEFT's `model.prefix`), if they have one in common.
        tuner: PEFT's class of what holds its tensors: a wrapper of the model, or a prompt's encoder.
        attributes: Names of attributes that PEFT's model has with this method -> (model) -> the value.
        rates: (model, lr, ratio, weight_decay) -> parameter groups in which a method's factors learn at lr * ratio.
    """

    name: str
    peft_type: str
    config: Any
    attach: Any
    train_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compare_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trains: Any = None
    start: Any = None
    rows: Any = None
    names: Any = None
    files: Any = None
    combine: Any = None
    rates: Any = None
    prefix: str | None = None
    tuner: Any = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load(self, part: str) -> Any:
        """The object that the attribute `part`, or `part` of `attributes`, names; None if the method has none.

        Raises ValueError for an import string that leads nowhere; names the method and the string.
        """
        value = self.attributes[part] if part in self.attributes else getattr(self, part, None)
        if not isinstance(value, str):
            return value
        module, _, name = value.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"method {self.name!r}: {part}={value!r} leads nowhere ({error}); it must be 'package.module:name'"
            ) from error

    def is_config_of(self, config_class: type) -> bool:
        """True if `config_class` is the method's config class. Imports nothing."""
        return self.config in (config_class, f"{config_class.__module__}:{config_class.__qualname__}")


_registered: dict[str, Registration] = {}


def register(name: str, config: Any, attach: Any, peft_type: str | None = None, **parts: Any) -> Registration:
    """Add a method to the table; a second registration of a name replaces the first.

    Args:
        name, config, attach, parts: See `Registration`.
        peft_type: Its name in `adapter_config.json`; by default `name` in capitals.
    """
    _registered[name] = Registration(name, peft_type or name.upper(), config, attach, **parts)
    return _registered[name]


def unregister(name: str) -> None:
    """Take a method that was registered out of the table again.

    Raises KeyError when none was registered by that name.
    """
    del _registered[name]


@functools.cache
def _own_methods() -> dict[str, Registration]:
    return {method.name: method for room in ROOMS for method in importlib.import_module(room).METHODS}


_entry_points_loaded = False


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    # Set first: an entry point may look into the table itself.
    _entry_points_loaded = True
    import importlib.metadata

    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            point.load()()
        except Exception as error:
            _entry_points_loaded = False
            package = point.dist.name if point.dist else "an installed package"
            raise ValueError(
                f"{package} offers minipeft a method by the entry point {point.name} = {point.value}, which failed "
                f"({type(error).__name__}: {error}): mend it, or uninstall the package"
            ) from error


class _Methods(Mapping[str, Registration]):
    """The table as a mapping: minipeft's own methods in the order of `ROOMS`, then those that were registered."""

    def _table(self) -> dict[str, Registration]:
        _load_entry_points()
        return {**_own_methods(), **_registered}

    def __getitem__(self, name: str) -> Registration:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())


METHODS: Mapping[str, Registration] = _Methods()


def method_of(peft_type: str) -> Registration:
    """The method that adapters of this `peft_type` are of.

    Raises KeyError when no method is registered for it.
    """
    found = next((method for method in METHODS.values() if method.peft_type == peft_type), None)
    if found is None:
        raise KeyError(peft_type)
    return found


def type_of(config_class: type) -> str | None:
    """The `peft_type` of a config class or of the registered class that it derives from; None if there is none."""
    for parent in config_class.__mro__:
        for method in METHODS.values():
            if method.is_config_of(parent):
                return method.peft_type
    return None


def optional_part(part: str, peft_types: Iterable[str]) -> Any:
    """The function `part` (`combine`, `rates`) of the first of these methods that has it.

    If none of them has one, another method's is returned: called, it raises an error that names the adapters that it
    does take.
    """
    methods = [*(method_of(peft_type) for peft_type in peft_types), *METHODS.values()]
    return next(method.load(part) for method in methods if getattr(method, part) is not None)

"""A package `peft` that is minipeft under PEFT's names, for running PEFT's tests.

Every submodule that PEFT has exists here, made on demand. A name in it is, in this order: minipeft's of that name, in
the submodule of that name or at its top; minipeft's equivalent of another name (`EQUIVALENTS`); a helper that only
tests need (`HELPERS`); a stand-in for a method that minipeft does not have, which makes the test that calls it count as
another method's; or a stand-in that raises AttributeError with its name when it is used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import pkgutil
import sys
import types
from pathlib import Path
from typing import Any

import names

# What PEFT has under these names, and minipeft under another.
EQUIVALENTS = {
    "BaseTunerLayer": "AdapterModule",
    "LoraLayer": "LoraLayer",
    "AuxiliaryTrainingWrapper": "TrainedModule",
    "ModulesToSaveWrapper": "TrainedModule",
    "PromptLearningConfig": "VirtualTokensConfig",
}


class OtherMethod(Exception):
    """A test calls a method that minipeft does not have."""


# Set by the plugin while a test runs: at import time, a config of another method is an inert object.
test_runs = False
# What was called of other methods since the plugin last looked.
foreign_calls: list[str] = []


class _ForeignMeta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if test_runs:
            foreign_calls.append(cls.__name__)
            raise OtherMethod(f"minipeft does not have {cls.__module__}.{cls.__name__}")
        return object.__new__(cls)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name != "__dataclass_fields__":
            raise AttributeError(name)
        if test_runs:
            foreign_calls.append(cls.__name__)
            raise OtherMethod(f"minipeft does not have {cls.__module__}.{cls.__name__}.{name}")
        return None


class _MissingMeta(type):
    def _refuse(cls, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError(f"minipeft has no {cls.__module__}.{cls.__name__}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls._refuse()

    __call__ = __instancecheck__ = __subclasscheck__ = __iter__ = __len__ = __getitem__ = __contains__ = _refuse


def _stand_in(module: str, name: str) -> Any:
    namespace = {"__module__": module, "__qualname__": name}
    if names.is_foreign(module, name):
        return _ForeignMeta(name, (), namespace)
    # Something that can be raised or warned must be a class that can.
    for base in (Warning, Exception):
        if name.endswith(base.__name__ if base is Warning else "Error"):
            return type(name, (base,), namespace)
    return _MissingMeta(name, (), namespace)


def infer_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _get_submodules(model: Any, key: str) -> tuple[Any, Any, str]:
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


class _Tuners(dict):
    def __missing__(self, method: Any) -> Any:
        return types.SimpleNamespace(uses_shared_state=False)


HELPERS = {
    "infer_device": infer_device,
    "_get_submodules": _get_submodules,
    "PEFT_TYPE_TO_TUNER_MAPPING": _Tuners(),
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": "all-linear",
}


def _helper(module: str, name: str) -> Any:
    if name in HELPERS:
        return HELPERS[name]
    if module == "peft.import_utils" and name.startswith("is_transformers_ge_v"):
        wanted = [int(part) for part in name.removeprefix("is_transformers_ge_v").split("_")]
        have = [int(part) for part in importlib.metadata.version("transformers").split(".")[: len(wanted)]]
        return have >= wanted
    if module == "peft.import_utils" and name.startswith("is_"):
        package = name.removeprefix("is_").removesuffix("_available")
        return lambda: importlib.util.find_spec(package) is not None
    return None


def _find(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    import minipeft

    try:
        return getattr(importlib.import_module("minipeft" + module.removeprefix("peft")), name)
    except (ImportError, AttributeError):
        pass
    if name in minipeft.__all__:
        return getattr(minipeft, name)
    if name in EQUIVALENTS and (found := _class_of_minipeft(EQUIVALENTS[name])) is not None:
        return found
    helper = _helper(module, name)
    if helper is not None:
        return helper
    if _exists(f"{module}.{name}"):
        return importlib.import_module(f"{module}.{name}")
    return _stand_in(module, name)


def _class_of_minipeft(name: str) -> Any:
    """The class called `name`, wherever minipeft defines it."""
    import minipeft

    for info in pkgutil.walk_packages(minipeft.__path__, "minipeft."):
        if info.name.rsplit(".", 1)[-1] == "__main__":
            continue
        try:
            found = vars(importlib.import_module(info.name)).get(name)
        except Exception:  # a part whose packages are not installed
            continue
        if isinstance(found, type) and found.__module__ == info.name:
            return found
    return None


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = _find(self.__name__, name)
        setattr(self, name, value)
        return value


def _exists(name: str) -> bool:
    """Whether PEFT has a module of this name (the runner says where its source lies)."""
    path = Path(_source(), *name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def _source() -> str:
    import os

    return os.environ["PEFT_SOURCE"]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not fullname.startswith("peft.") or not _exists(fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


sys.meta_path.insert(0, _Finder())
__version__ = "0.21.2"


def __getattr__(name: str) -> Any:
    value = globals()[name] = _find("peft", name)
    return value

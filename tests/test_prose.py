"""Docstrings: every public function has one, and each opens with its noun or verb."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minipeft.commands.bench import load_benchmarks

ROOT = Path(__file__).parent.parent
PACKAGES = {"minipeft": "minipeft", "minipeft_kernels": "kernels/minipeft_kernels", "benchmarks": "benchmarks"}
QUESTION_WORDS = {"What", "Whether", "How", "Where", "Which", "Who", "When", "Why"}
OURS = tuple(PACKAGES)


def modules() -> list[ModuleType]:
    """Every module of the three packages, imported; the programs' starts and the compiled library are left out."""
    load_benchmarks()
    found = []
    for name, folder in PACKAGES.items():
        found.append(importlib.import_module(name))
        for info in pkgutil.walk_packages([str(ROOT / folder)], f"{name}."):
            if not info.name.endswith(("__main__", "._native")):
                found.append(importlib.import_module(info.name))
    return found


def public_functions(module: ModuleType) -> Iterator[tuple[str, Any, type | None]]:
    """(full name, function, its class or None) for each public function and method that `module` defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield f"{module.__name__}.{name}", value, None
        elif inspect.isclass(value):
            yield from methods(value)


def methods(cls: type) -> Iterator[tuple[str, Any, type]]:
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(function) and function.__module__.startswith(OURS):
            yield f"{cls.__module__}.{cls.__qualname__}.{name}", function, cls


def described(function: Any, cls: type | None) -> bool:
    """True if the function has a docstring, or overrides one that has: any of ours, or a library's but `forward`."""
    if function.__doc__:
        return True
    for base in cls.__mro__[1:] if cls else ():
        other = vars(base).get(function.__name__)
        if getattr(other, "__doc__", None) and (base.__module__.startswith(OURS) or function.__name__ != "forward"):
            return True
    return False


def test_every_public_function_says_what_it_does() -> None:
    functions = [entry for module in modules() for entry in public_functions(module)]
    silent = sorted(name for name, function, cls in functions if not described(function, cls))
    assert len(functions) > 500
    assert not silent, f"{len(silent)} of {len(functions)} public functions have no docstring"


@pytest.mark.parametrize("package", PACKAGES.values())
def test_docstrings_open_with_their_noun(package: str) -> None:
    questions = []
    for file in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if text.split(" ")[0].split("\n")[0] in QUESTION_WORDS:
                    questions.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not questions

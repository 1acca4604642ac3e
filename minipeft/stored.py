"""Checks of what is read from files: JSON, YAML, and the kinds of the fields in them, all in this one place.

A file may come from anybody, damaged or made to do harm. It is read in bounded time and memory, or refused by one
error that names it: nesting without end, numbers that JSON does not have, text that is none, YAML whose few lines stand
for billions of values, fields of another kind than their config says.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# No file of settings comes near these.
MOST_BYTES = 256 << 20
DEEPEST = 100
MOST_YAML_VALUES = 1_000_000
# Of a size that a config may name, such as a rank: no layer has as many features.
MOST_COUNT = 1 << 24
LONGEST_ERROR = 1000


def brief(text: str, most: int = LONGEST_ERROR) -> str:
    """`text`, its middle left out where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most * 3 // 4]} ... {text[-most // 5 :]}"


def shown(value: Any) -> str:
    """A value as an error shows it: its repr, not longer than a line or two."""
    return brief(repr(value), 200)


@contextlib.contextmanager
def naming(source: str | Path) -> Iterator[None]:
    """Put the name of a file in front of an error about what was read from it, where the error does not say it.

    Errors with names of ours stay of their class; others, also of memory that is not there, become ValueErrors: kinds
    and sizes are the file's.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError, OverflowError, re.error) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not _asks_for_too_much(error):
            raise
        if isinstance(error, ValueError) and str(source) in text and len(text) <= 2 * LONGEST_ERROR:
            raise
        kind = type(error) if type(error).__module__.startswith("minipeft.") else ValueError
        raise kind(brief(text) if str(source) in text else f"{source}: {brief(text)}") from error


def _asks_for_too_much(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError | OverflowError) or any(
        word in said for word in ("memory", "overflow", "too large", "invalid shape", "storage size")
    )


# JSON


def read_json(path: str | Path, error: Callable[[str], Exception] = ValueError) -> Any:
    """The JSON in a file.

    Args:
        error: makes the error that is raised, of a sentence that names the file.

    Raises OSError for a file that cannot be read, `error` for one that holds anything but plain JSON.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    return parse_json(content, str(path), error)


def read_object(path: str | Path, error: Callable[[str], Exception] = ValueError) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object."""
    values = read_json(path, error)
    if not isinstance(values, dict):
        raise error(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def parse_json(content: bytes, source: str, error: Callable[[str], Exception] = ValueError) -> Any:
    """The values in `content`, UTF-8: strings that are text, finite numbers, nested up to `DEEPEST` deep."""
    if len(content) > MOST_BYTES:
        raise error(f"{source} is larger than {MOST_BYTES:,} bytes, and JSON of settings is not")
    try:
        values = json.loads(content.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise error(f"{source} is not valid JSON: it is nested too deep") from None
    except ValueError as problem:
        # Also a whole number of thousands of digits, which Python does not convert.
        raise error(f"{source} is not valid JSON: {brief(str(problem), 200)}") from None
    if wrong := _problem(values):
        raise error(f"{source} is not valid JSON: {wrong}")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{brief(text, 50)} is larger than any number")
    return value


def _problem(values: Any) -> str:
    """The reason why values that were read are not taken, "" if they are."""
    level, depth = [values], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            return "it is nested too deep"
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:
                    return "a string holds an unpaired surrogate"
        level = below
    return ""


# YAML


def parse_yaml(text: str, loader: Any = None) -> Any:
    """The values in YAML, which Python's own types are made of alone.

    Args:
        loader: a subclass of `yaml.SafeLoader`, or None for itself.

    Raises:
        yaml.YAMLError: it is no YAML. ValueError: it is nested too deep, holds what cannot be converted, or its aliases
            stand for more than `MOST_YAML_VALUES` values.
    """
    import yaml

    made = (loader or yaml.SafeLoader)(text)
    try:
        node = made.get_single_node()
        if node is None:
            return None
        if _expanded(node) > MOST_YAML_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_YAML_VALUES:,} values")
        return made.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (AttributeError, KeyError, TypeError, IndexError, OverflowError) as error:
        # What PyYAML raises for a tag over text that is not of its kind, such as `!!timestamp x`.
        raise ValueError(f"a value is not of the kind that its tag says ({type(error).__name__})") from None
    finally:
        made.dispose()


def _expanded(root: Any) -> float:
    """The number of values that a YAML node stands for with every alias written out; infinity if it holds itself."""
    sizes: dict[int, float] = {}
    stack = [(root, False)]
    while stack:
        node, after = stack.pop()
        children = _children(node)
        if after:
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
        elif id(node) not in sizes:
            sizes[id(node)] = math.inf  # until all below it is known: what holds itself stays so
            stack.append((node, True))
            stack += [(child, False) for child in children if id(child) not in sizes]
    return sizes[id(root)]


def _children(node: Any) -> list[Any]:
    if isinstance(node.value, str):
        return []
    return [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]


# Fields


def check_fields(values: Mapping[str, Any], of: type, source: str) -> None:
    """Raise ValueError, naming `source` and the field, for a value of another kind than the dataclass `of` says.

    null passes: it leaves a field out. A number must be finite, a whole one within what a tensor can have.
    """
    for field, hint in _hints(of).items():
        if values.get(field) is not None and not fits(values[field], hint):
            raise ValueError(f"{source}: {field} must be {_words(hint)}, got {shown(values[field])}")


@functools.cache
def _hints(of: type) -> dict[str, Any]:
    return typing.get_type_hints(of)


def fits(value: Any, hint: Any) -> bool:
    """True if a value, as JSON has them, is of the kind that a type hint says."""
    kinds = typing.get_args(hint)
    origin = typing.get_origin(hint) or hint
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, kind) for kind in kinds)
    if origin is typing.ClassVar or origin is Any:
        return True
    if origin is bool:
        return isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    if origin is str or (isinstance(origin, type) and issubclass(origin, enum.Enum)):
        return isinstance(value, str)
    if origin in (list, set):
        return isinstance(value, list | set | tuple) and all(fits(item, kind) for kind in kinds[:1] for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and all(fits(item, kind) for kind in kinds[1:2] for _, item in pairs)
    return value is None if origin is type(None) else isinstance(value, Mapping | origin)


def is_finite(value: Any) -> bool:
    """True for a number that a float can hold, NaN and infinity left out."""
    try:
        return math.isfinite(value)
    except (OverflowError, TypeError):
        return False


def check_regex(name: str, expression: str) -> None:
    """Raise ValueError, which calls it `name`, unless `expression` is a regular expression."""
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} {shown(expression)} is not a regular expression: {error}") from None


_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
_ITEMS = {int: "whole numbers", float: "finite numbers", str: "texts"}
_GROUPS = {list: "a list", set: "a list", dict: "a mapping"}


def _words(hint: Any) -> str:
    kinds, origin = typing.get_args(hint), typing.get_origin(hint) or hint
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_words(kind) for kind in kinds if kind is not type(None)))
    if origin in _GROUPS:
        of = f" of {_ITEMS[kinds[-1]]}" if kinds and kinds[-1] in _ITEMS else ""
        return _GROUPS[origin] + of
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "text"
    return _WORDS.get(origin, "a mapping")

"""YAML that a user wrote: read whole and strictly, every mistake in one sentence that says where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from minipeft.train.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which yaml would drop the first in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def load_yaml(path: str | Path, what: str) -> Any:
    """What a YAML file holds; None for an empty one.

    Args:
        what: the file's name in errors.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, or a key given twice.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
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
    except RecursionError:
        raise ConfigError(f"{what} is nested too deep") from None
    except ValueError as error:
        # A number of too many digits, a date that there is not.
        raise ConfigError(f"{what} holds a value that cannot be read: {error}") from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    return ": ".join(part for part in (error.context, error.problem) if part)

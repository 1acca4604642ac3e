"""Training records: JSON Lines files, checked line by line as they are read.

A record is a JSON object of one of three shapes:

    {"text": "..."}                                   the whole text is learned
    {"prompt": "...", "completion": "..."}            only the completion is learned
    {"messages": [{"role": "...", "content": "..."}]} only the assistant's turns are learned

"prompt" and "completion" may be lists of messages, too, of which only the completion's are learned. Beside "messages",
"tools" is what the chat template tells the model of its tools. A message may have what the template knows besides, such
as "reasoning_content" or "tool_calls", with which "content" may be null; one with "weight": 0 or "train": false is read
and not learned. Other keys of a record are allowed and ignored, so that files may carry ids or labels of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.files import write_text
from minipeft.train.chats import is_learned
from minipeft.train.errors import DataError

SHAPES = '{"text"}, {"prompt", "completion"} or {"messages"}'


@dataclass(frozen=True)
class Record:
    """One checked record. Exactly one of `text`, `completion` (with `prompt`) and `messages` (with `tools`) is set."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: Any = None
    path: str | None = None
    line: int | None = None

    def error(self, message: str) -> DataError:
        """A DataError that points at this record."""
        return DataError(message, self.path, self.line)


def read_jsonl(path: str | Path) -> list[Record]:
    """Read and check every record of a JSONL file. Blank lines are skipped.

    Raises:
        DataError: no such file, no records, or a bad record: with file, line, and what was expected.
    """
    try:
        content = Path(path).read_bytes()
    except IsADirectoryError:
        raise DataError("expected a JSONL file, found a directory", path) from None
    except OSError as error:
        raise DataError(f"cannot read the data file: {error.strerror or error}", path) from None
    # Split on newlines only: str.splitlines would also cut at U+2028, which JSON allows inside strings.
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    records = [_parse_line(raw, path, number) for number, raw in enumerate(lines, 1) if raw.strip()]
    if not records:
        raise DataError(f"the data set is empty: expected one JSON object a line, {SHAPES}", path)
    return records


def make_records(objects: Iterable[Mapping[str, Any]], path: str | None = None) -> list[Record]:
    """Check records that are already in memory; errors count them from 1."""
    records = [_check_object(obj, path, number) for number, obj in enumerate(objects, 1)]
    if not records:
        raise DataError(f"the data set is empty: expected records of the shape {SHAPES}", path)
    return records


def _parse_line(raw: bytes, path: str | Path, line: int) -> Record:
    try:
        obj = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        message = f"expected UTF-8 text, found byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise DataError(message, path, line) from None
    except json.JSONDecodeError as error:
        message = f"expected one JSON object, found invalid JSON ({error.msg} at column {error.colno})"
        raise DataError(message, path, line) from None
    except _RepeatedKey as error:
        raise DataError(f"expected every key once, found {error.args[0]!r} twice in one object", path, line) from None
    except RecursionError:
        raise DataError("expected one JSON object, found JSON that is nested too deep", path, line) from None
    except ValueError:
        # Python refuses whole numbers of more than some thousand digits.
        raise DataError("expected one JSON object, found a number of too many digits", path, line) from None
    return _check_object(obj, path, line)


class _RepeatedKey(Exception):
    """An object has a key twice, of which json would keep the last in silence."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKey(key)
        found[key] = value
    return found


def _check_object(obj: Any, path: str | Path | None, line: int) -> Record:
    where: dict[str, Any] = {"path": None if path is None else str(path), "line": line}
    if not isinstance(obj, Mapping):
        raise DataError(f"expected a JSON object, found {_json_type(obj)}", path, line)
    shapes = [name for name, keys in _KEYS.items() if any(key in obj for key in keys)]
    if len(shapes) != 1:
        found = f"keys {sorted(map(str, obj))}" if obj else "an empty object"
        raise DataError(f"expected exactly one of {SHAPES}, found {found}", path, line)
    if shapes[0] == "prompt" and any(isinstance(obj.get(key), list | tuple) for key in _KEYS["prompt"]):
        obj = {**obj, "messages": _joined(obj, path, line)}
        shapes = ["messages"]
    if shapes[0] == "messages":
        tools = obj.get("tools")
        if not isinstance(tools, list | None) or not all(isinstance(tool, Mapping) for tool in tools or ()):
            raise DataError(f"expected 'tools' to be a list of objects, found {_json_type(tools)}", path, line)
        return Record(messages=_check_messages(obj["messages"], path, line), tools=tools or None, **where)
    strings: dict[str, Any] = {key: _check_string(obj, key, path, line) for key in _KEYS[shapes[0]]}
    for key in ("text", "completion"):
        if key in strings and not strings[key].strip():
            raise DataError(f"expected a non-empty {key!r}: there is nothing to learn", path, line)
    return Record(**strings, **where)


_KEYS = {"text": ("text",), "prompt": ("prompt", "completion"), "messages": ("messages",)}


def _check_string(obj: Mapping[str, Any], key: str, path: str | Path | None, line: int, where: str = "") -> str:
    if key not in obj:
        raise DataError(f"expected key {key!r}{where}, found keys {sorted(map(str, obj))}", path, line)
    value = obj[key]
    if not isinstance(value, str):
        raise DataError(f"expected {key!r}{where} to be a string, found {_json_type(value)}", path, line)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{key!r}{where} holds an unpaired surrogate, not valid text", path, line) from None
    return value


def _joined(obj: Mapping[str, Any], path: str | Path | None, line: int) -> list[Any]:
    """The messages of a prompt, not learned, and of its completion."""
    for key in _KEYS["prompt"]:
        if not isinstance(obj.get(key), list | tuple):
            found = _json_type(obj[key]) if key in obj else "nothing"
            found = f"for {key!r} {found}"
            raise DataError(f"expected 'prompt' and 'completion' both as lists of messages, found {found}", path, line)
    before = [{**m, "weight": 0} if isinstance(m, Mapping) else m for m in obj["prompt"]]
    return [*before, *obj["completion"]]


def _check_messages(value: Any, path: str | Path | None, line: int) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if isinstance(value, list | tuple) else _json_type(value)
        raise DataError(f"expected 'messages' to be a non-empty list, found {found}", path, line)
    for number, message in enumerate(value, 1):
        where = f" of message {number}"
        if not isinstance(message, Mapping):
            found = _json_type(message)
            raise DataError(f"expected message {number} to be an object, found {found}", path, line)
        _check_string(message, "role", path, line, where)
        calls = message.get("tool_calls")
        if not isinstance(calls, list | None) or not all(isinstance(call, Mapping) for call in calls or ()):
            raise DataError(f"expected 'tool_calls'{where} to be a list of objects", path, line)
        if message.get("weight", 1) not in (0, 1) or message.get("train", True) not in (True, False):
            asked = {key: message[key] for key in ("weight", "train") if key in message}
            raise DataError(f"expected 'weight'{where} to be 0 or 1 and 'train' true or false, got {asked}", path, line)
        if not (calls and message.get("content") is None):
            _check_string(message, "content", path, line, where)
    said = [m for m in value if m["role"] == "assistant" and (m.get("tool_calls") or m["content"].strip())]
    if not any(is_learned(message) for message in said):
        but = ", which is not excepted by its weight" if said else ""
        raise DataError(f"expected at least one non-empty message with role 'assistant'{but}", path, line)
    return tuple(value)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write a JSONL file that `read_jsonl` reads."""
    lines = [json.dumps(as_object(record), ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def as_object(record: Record) -> dict[str, object]:
    """The JSON object that the record was read from, without keys that are not its own."""
    if record.messages is not None:
        tools = {} if record.tools is None else {"tools": record.tools}
        return {"messages": [dict(message) for message in record.messages], **tools}
    if record.text is not None:
        return {"text": record.text}
    return {"prompt": record.prompt, "completion": record.completion}

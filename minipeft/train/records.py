"""Training records, checked one by one as they are read from files (`sources.py`) or memory.

A record is a JSON object of one of three shapes:

    {"text": "..."}                                   the whole text is learned
    {"prompt": "...", "completion": "..."}            only the completion is learned
    {"messages": [{"role": "...", "content": "..."}]} only the assistant's turns are learned

"prompt" and "completion" may be lists of messages, too, of which only the completion's are learned. Beside "messages",
"tools" is what the chat template tells the model of its tools. A message may have what the template knows besides, such
as "reasoning_content" or "tool_calls", with which "content" may be null; one with "weight": 0 or "train": false is read
and not learned. Other keys of a record are allowed and ignored, so that files may carry ids or labels of their own.
Records under ShareGPT's and Alpaca's names become messages (`fields.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.files import write_text
from minipeft.train.chats import is_learned
from minipeft.train.errors import DataError
from minipeft.train.fields import as_ours
from minipeft.train.sources import jsonl, objects, shares

SHAPES = '{"text"}, {"prompt", "completion"} or {"messages"}'
THEIRS = 'or ShareGPT\'s {"conversations"}, or Alpaca\'s {"instruction", "output"}'


@dataclass(frozen=True)
class Record:
    """One checked record. Exactly one of `text`, `completion` (with `prompt`) and `messages` (with `tools`) is set.

    Attributes:
        share: how often an epoch takes it, on average: that of the place it was read from.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: Any = None
    path: str | None = None
    line: int | None = None
    share: float = 1.0

    def error(self, message: str) -> DataError:
        """A DataError that points at this record."""
        return DataError(message, self.path, self.line)


def read_jsonl(path: str | Path) -> list[Record]:
    """Read and check every record of a JSONL file. Blank lines are skipped.

    Raises:
        DataError: no such file, no records, or a bad record: with file, line, and what was expected.
    """
    if Path(path).is_dir():
        raise DataError("expected a JSONL file, found a directory", path)
    return _not_empty([check(value, where, line) for where, line, value in jsonl(Path(path))], path)


def read_records(data: str | Path) -> list[Record]:
    """All records of data of any kind (see `sources.py`), each once.

    Raises:
        DataError: see `iterate_records`; a share, which is for data to train on.
    """
    records = list(iterate_records(data))
    if any(record.share != 1 for record in records):
        raise DataError("expected no share after a colon: only what is trained on has one", data)
    return records


def iterate_records(data: str | Path) -> Iterator[Record]:
    """The records of data of any kind, one after the other as they are read.

    Raises:
        DataError: no such place, nothing there, or a bad record: with file, line or row, and what was expected.
        MissingExtraError: a format whose library is not installed.
    """
    for place, share in shares(data):
        found = False
        for path, line, value in objects(place):
            found = True
            yield check(value, path, line, share)
        if not found:
            raise _empty(place)


def _empty(path: str | Path | None) -> DataError:
    return DataError(f"the data set is empty: expected records of the shape {SHAPES}", path)


def _not_empty(records: list[Record], path: str | Path | None) -> list[Record]:
    if not records:
        raise _empty(path)
    return records


def make_records(values: Iterable[Mapping[str, Any]], path: str | None = None) -> list[Record]:
    """Check records that are already in memory; errors count them from 1."""
    return _not_empty([check(value, path, number) for number, value in enumerate(values, 1)], path)


def check(obj: Any, path: str | Path | None, line: int, share: float = 1.0) -> Record:
    """The record that an object is; one that could not be read is the error that says so (`sources.Rows`).

    Raises:
        DataError: it is none, with the place that is given, and what was expected.
    """
    where: dict[str, Any] = {"path": None if path is None else str(path), "line": line, "share": share}
    if isinstance(obj, DataError):
        raise obj
    if not isinstance(obj, Mapping):
        raise DataError(f"expected a JSON object, found {_json_type(obj)}", path, line)
    try:
        obj = as_ours(obj)
    except ValueError as error:
        raise DataError(str(error), path, line) from None
    shapes = [name for name, keys in _KEYS.items() if any(key in obj for key in keys)]
    if len(shapes) != 1:
        found = f"keys {sorted(map(str, obj))}" if obj else "an empty object"
        raise DataError(f"expected exactly one of {SHAPES}, {THEIRS}, found {found}", path, line)
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

"""Other names of records: ShareGPT's conversations and Alpaca's instructions, as the messages that they are.

    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system", "tools"}
    {"instruction": "...", "input": "...", "output": "...", "system", "history": [["...", "..."], ...]}

An instruction and its input are one message, with a newline between them. "text" beside Alpaca's fields, the prompt
and the answer in a template of Alpaca's own, is left to the model's chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "assistant",
}
_TALKS = ("conversations", "conversation")


def as_ours(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record under our names; one that is neither ShareGPT's nor Alpaca's is returned as it is.

    Raises:
        ValueError: a record of theirs with something that cannot be read.
    """
    key = next((key for key in _TALKS if key in record and "messages" not in record), None)
    if key is not None:
        return _share_gpt(record, key)
    if "instruction" in record and "output" in record and not {"messages", "prompt", "completion"} & record.keys():
        return _alpaca(record)
    return record


def _share_gpt(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    turns = record[key]
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(f"expected {key!r} to be a non-empty list")
    messages = [_message(turn, f"message {number} of {key!r}") for number, turn in enumerate(turns, 1)]
    found = {"messages": _system(record) + messages}
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "'tools'")
    return {**found, "tools": tools} if tools else found


def _message(turn: Any, where: str) -> Any:
    if not isinstance(turn, Mapping) or ("role" in turn and "content" in turn):
        return turn
    if "from" not in turn or "value" not in turn:
        raise ValueError(f"expected {where} to have 'from' and 'value', found keys {sorted(map(str, turn))}")
    role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise ValueError(f"expected 'from' of {where} to be one of {', '.join(_ROLES)}, got {turn['from']!r}")
    rest = {key: turn[key] for key in ("weight", "train") if key in turn}
    if turn["from"] != "function_call":
        return {"role": role, "content": turn["value"], **rest}
    call = _json(turn["value"], f"'value' of {where}") if isinstance(turn["value"], str) else turn["value"]
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"expected 'value' of {where} to be the JSON object of a call, or a list of them")
    return {"role": role, "content": None, "tool_calls": [{"type": "function", "function": c} for c in calls], **rest}


def _alpaca(record: Mapping[str, Any]) -> dict[str, Any]:
    instruction, more, output = _text(record, "instruction"), _text(record, "input"), _text(record, "output")
    if not output.strip():
        raise ValueError("expected a non-empty 'output': there is nothing to learn")
    messages = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list | tuple):
        raise ValueError(f"expected 'history' to be a list, found {type(history).__name__}")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"expected entry {number} of 'history' to be a question and its answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n".join(text for text in (instruction, more) if text)
    return {"messages": [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": output}]}


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    words = _text(record, "system")
    return [{"role": "system", "content": words}] if words else []


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str | None):
        raise ValueError(f"expected {key!r} to be a string, found {type(value).__name__}")
    return value or ""


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"expected {where} to be JSON") from None

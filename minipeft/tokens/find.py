"""The modules whose rows an adapter trains: from names and row numbers to parts of the adapter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from minipeft.adapter import Part, base_modules
from minipeft.copies import TrainedModule
from minipeft.targets import ends_with
from minipeft.tokens.layer import TrainedRows

_DEFAULT_NAME = "embed_tokens"


def check_indices(field: str, indices: Any) -> None:
    """Raise ValueError unless `indices` is a list of different row numbers."""
    numbers = isinstance(indices, list | tuple) and all(type(i) is int and i >= 0 for i in indices)
    if not numbers or len(set(indices)) != len(indices):
        raise ValueError(f"{field} must be a list of different token numbers from 0 on, got {indices!r}")


def named_rows(model: Any, wanted: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Names (or name endings) -> row numbers: a list of numbers is of the model's input embedding."""
    if isinstance(wanted, Mapping):
        return dict(wanted)
    return {input_embedding(model) or _DEFAULT_NAME: wanted}


def input_embedding(model: Any) -> str | None:
    """The dotted name of the model's input embedding; None if the model does not say."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        return None
    return next((path for path, module in base_modules(model) if module is embedding and path), None)


def row_parts(
    model: Any,
    wanted: Mapping[str, Sequence[int]],
    key: str,
    taken: Sequence[str] = (),
    saved: Sequence[str] = (),
    ensure_tied: bool = False,
    random: bool = False,
    key_of_followers: str | None = None,
    asked: Any = None,
) -> list[Part]:
    """The parts of an adapter that trains the rows `wanted` (names or name endings -> row numbers).

    Modules whose weight is that of a named embedding follow it, unless rows of their own are wanted of them.

    Args:
        key: The name of the rows in the adapter's file, after the module's.
        taken: Dotted names of the modules that the adapter updates otherwise.
        saved: Dotted names of the modules that it trains whole.
        ensure_tied: Raise when different rows are wanted of modules whose weights are tied.
        random: Start from random numbers, not from the base's rows.
        key_of_followers: As `key`, if the file has the rows of followers, too.
        asked: The names as the user gave them, for errors.

    Raises ValueError when no name matches anything and for numbers out of range, TypeError for modules that have no
        rows to train or that the adapter updates otherwise.
    """
    modules = {path: module for path, module in base_modules(model) if path}
    found = {path: rows for name, rows in wanted.items() for path in modules if ends_with(path, name)}
    missing = {name for name in wanted if not any(ends_with(path, name) for path in modules)}
    if missing and not found:
        raise ValueError(
            f"Target modules {asked or missing} not found in the base model. Please check the target modules and try "
            "again."
        )
    for path, rows in found.items():
        _check(path, modules[path], rows, taken, saved)
    parts: list[Part] = []
    leaders: dict[int, str] = {}
    for path in sorted(found, key=lambda path: not isinstance(modules[path], nn.Embedding)):
        leader = leaders.get(id(_base_weight(modules[path])))
        if leader is not None and list(found[leader]) == list(found[path]):
            parts.append(_follower(path, modules[leader], key_of_followers))
            continue
        if leader is not None and ensure_tied:
            raise ValueError(
                "Cannot ensure weight tying when different token indices are specified for tied modules: "
                f"{leader} {list(found[leader])}, {path} {list(found[path])}"
            )
        leaders.setdefault(id(_base_weight(modules[path])), path)
        add = functools.partial(TrainedRows.add_rows, indices=list(found[path]), key=key, random=random)
        parts.append(Part(path, TrainedRows, add))
    for path, module in modules.items():
        leader = leaders.get(id(_base_weight(module)))
        whole = any(path == name or path.startswith(f"{name}.") for name in saved)
        if leader is not None and path not in found and not whole and isinstance(modules[leader], nn.Embedding):
            parts.append(_follower(path, modules[leader], key_of_followers))
    return parts


def _follower(path: str, leader: nn.Module, key: str | None) -> Part:
    return Part(path, TrainedRows, functools.partial(TrainedRows.follow_rows, leader=leader, key=key))


def _base_weight(module: nn.Module) -> Any:
    """The base weight, which tied modules share; an object that no other module has if there is none."""
    held = getattr(module, "_originals", {}).get("weight", module._parameters.get("weight"))
    return module if held is None else held


def _check(path: str, module: nn.Module, rows: Sequence[int], taken: Sequence[str], saved: Sequence[str]) -> None:
    if any(path == name or path.startswith(f"{name}.") for name in saved):
        raise ValueError(
            f"The embedding layer is already marked to be trained fully: {path} is in modules_to_save, and its rows "
            f"{list(rows)} would be trained once more; leave it out of one of them"
        )
    if isinstance(module, TrainedModule):
        raise ValueError(f"{path} is in another adapter's modules_to_save, and so cannot have rows of its own trained")
    weight = _base_weight(module)
    fits = isinstance(module, nn.Embedding | nn.Linear) and not isinstance(weight, nn.Module)
    if path in taken or not fits or weight.dim() != 2 or not weight.is_floating_point():
        why = "which the adapter updates otherwise" if path in taken else "of which no rows can be trained"
        raise TypeError(
            f"trainable_token_indices cannot be applied to modules of type {type(module)}: {path}, {why}; it takes "
            "embeddings and linear layers that are no target_modules of the same adapter"
        )
    beyond = [index for index in rows if index >= len(weight)]
    if beyond:
        raise ValueError(f"{path} has {len(weight)} rows, so token {beyond[0]} has none: resize the vocabulary first")

"""Names of an adapter's tensors that mean modules by other names: a caller's mapping, and transformers' own renamings.

transformers renames the modules of a model from release to release and tells how checkpoints follow; an adapter that
was trained under the old names follows in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor


def mapped(stored: Mapping[str, Tensor], key_mapping: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """`stored` with every name rewritten by the first entry of `key_mapping` that matches it.

    Args:
        key_mapping: Regular expression -> replacement, for names without `prefix` (PEFT's argument).
        prefix: "base_model.model.", which stays.
    """
    return {_rewritten(name, key_mapping, prefix): tensor for name, tensor in stored.items()}


def following(stored: Mapping[str, Tensor], expected: Iterable[str], model: Any, prefix: str) -> dict[str, Tensor]:
    """`stored` with names that `model` does not have replaced by those that transformers says they have become.

    Args:
        expected: The names that the model has. A name that leads to none of them stays as it is.
    """
    have = set(expected)
    if have.issuperset(stored):
        return dict(stored)
    named = {name: name for name in stored}
    for rename in _renamings(model):
        for name in stored:
            if named[name] not in have and (new := prefix + rename(name.removeprefix(prefix))) in have:
                named[name] = new
    # Two names must not become one.
    taken = [*named.values()]
    return {named[name] if taken.count(named[name]) == 1 else name: tensor for name, tensor in stored.items()}


def _rewritten(name: str, key_mapping: Mapping[str, str], prefix: str) -> str:
    start = prefix if name.startswith(prefix) else ""
    for pattern, replacement in key_mapping.items():
        new, times = re.subn(pattern, replacement, name.removeprefix(start))
        if times:
            return start + new
    return name


def _renamings(model: Any) -> list[Callable[[str], str]]:
    """Functions from an old name to a new one: the model's own table, and those of transformers' for its classes."""
    own = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    found: list[Callable[[str], str]] = [lambda name: _rewritten(name, own, "")] if own else []
    if not any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        return found
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    return [*found, lambda name: rename_source_key(name, renamings, [])[0]] if renamings else found

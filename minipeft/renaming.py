"""Names of an adapter's tensors that mean modules by other names: a caller's mapping, and transformers' own renamings.

transformers renames the modules of a model from release to release and tells how checkpoints follow; an adapter that
was trained under the old names follows in the same way. It also puts the layers of a mixture's experts together, into
one parameter, and tells of which.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Fused:
    """A parameter of all experts of a mixture, and the layers that each expert had in its place, in order."""

    name: str
    layers: tuple[str, ...]


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
    for rename in renamings(model):
        for name in stored:
            if named[name] not in have and (new := prefix + rename(name.removeprefix(prefix))) in have:
                named[name] = new
    # Two names must not become one.
    taken = [*named.values()]
    return {named[name] if taken.count(named[name]) == 1 else name: tensor for name, tensor in stored.items()}


def fused_parameters(model: Any) -> list[Fused]:
    """The parameters of all experts that transformers makes of layers of single experts in checkpoints of `model`."""
    if not _is_transformers(model):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    made = {}
    for one in get_model_conversion_mapping(model):
        if not isinstance(one, WeightConverter) or len(one.target_patterns) != 1:
            continue
        sources = [re.search(r"experts\.\*\.(\w+)\.weight$", source) for source in one.source_patterns]
        steps = [type(step).__name__ for step in one.operations]
        if all(sources) and steps == ["MergeModulelist", "Concatenate"][: len(sources)]:
            name = one.target_patterns[0].rpartition(".")[2]
            made[name] = Fused(name, tuple(source[1] for source in sources if source))
    return list(made.values())


def converted_like(model_type: str | None) -> str | None:
    """The type of model whose conversion of checkpoints transformers takes for `model_type`, if that is another."""
    from transformers import conversion_mapping

    return conversion_mapping._MODEL_TO_CONVERSION_PATTERN.get(model_type)


def renamings(model: Any) -> list[Callable[[str], str]]:
    """Functions from an old name to a new one: the model's own table, those of transformers' for its classes, the head.

    The last is for an adapter that was trained on the model without its head, or with one where `model` has none.
    """
    own = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    found: list[Callable[[str], str]] = [lambda name: _rewritten(name, own, "")] if own else []
    if not _is_transformers(model):
        return found
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renaming = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    inner = f"{model.base_model_prefix}."
    return [
        *found,
        lambda name: rename_source_key(name, renaming, [])[0],
        lambda name: inner + name,
        lambda name: name.removeprefix(inner),
    ]


def _rewritten(name: str, key_mapping: Mapping[str, str], prefix: str) -> str:
    start = prefix if name.startswith(prefix) else ""
    for pattern, replacement in key_mapping.items():
        new, times = re.subn(pattern, replacement, name.removeprefix(start))
        if times:
            return start + new
    return name


def _is_transformers(model: Any) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)

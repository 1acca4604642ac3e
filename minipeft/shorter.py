"""Short lists of targets that select the same modules as long ones, as PEFT makes them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from minipeft.targets import ends_with, plain_module_names

# A list of fewer targets stays as it was given.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20


def shortened(model: nn.Module, targets: Any) -> Any:
    """`targets`, or, of a list of many, the shortest endings that select the same modules of `model`."""
    if isinstance(targets, str) or len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return targets
    names = plain_module_names(model)
    others = [name for name in names if not any(ends_with(name, target) for target in targets)]
    short = _find_minimal_target_modules(targets, others)
    return short if len(short) < len(targets) else targets


def shortest_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Names that select exactly `targets`: last parts where those suffice, whole names elsewhere."""
    names, chosen = plain_module_names(model), set(targets)
    taken: dict[str, bool] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        taken[leaf] = taken.get(leaf, True) and name in chosen
    return sorted({t.rpartition(".")[2] if taken[t.rpartition(".")[2]] else t for t in targets})


def _find_minimal_target_modules(target_modules: Collection[str], other_module_names: Collection[str]) -> set[str]:
    """Endings of `target_modules` at dots, each the shortest one that none of `other_module_names` has.

    Raises ValueError when `target_modules` is no list of names, holds an empty one or one of the other names.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError(f"target_modules should be a list or set of strings, got {target_modules!r}")
    if "" in target_modules:
        raise ValueError("target_modules should not contain an empty string, which would be the whole model")
    both = sorted(set(target_modules) & set(other_module_names))
    if both:
        raise ValueError(f"target_modules and other_module_names contain common elements: {both}")
    taken = {ending for name in other_module_names for ending in _endings(name)}
    return {next((e for e in _endings(target) if e not in taken), target) for target in target_modules}


def _endings(name: str) -> list[str]:
    """The endings of a dotted name, the shortest first: "c", "b.c", "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]

"""Names in a new adapter's config that match nothing: errors where training would leave something out, or warnings."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from minipeft.adapter import base_modules
from minipeft.errors import PeftWarning
from minipeft.experts import is_stack
from minipeft.packed import PackedLayer
from minipeft.shards import check_not_split
from minipeft.targets import TASK_HEADS, ends_with, is_conv1d, matches, no_match, plain_module_names


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | PackedLayer) or is_conv1d(module)


def check_names(model: nn.Module, config: Any) -> None:
    """Raise ValueError for a name that matches nothing, and for a model of whose modules each process has a part.

    In target_modules, modules_to_save, target_parameters and trainable_token_indices. For new adapters alone: a stored
    one is checked by its tensors.
    """
    check_not_split(model)
    names = plain_module_names(model)
    parameters = {
        f"{path}.{name}".strip("."): parameter
        for path, module in base_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    fused = sorted({name for _, module in base_modules(model) for name in module._parameters if is_stack(module, name)})
    targets: Any = getattr(config, "target_modules", None) or ()
    own_parameters = getattr(config, "target_parameters", None) or ()
    for target in () if isinstance(targets, str) else sorted(targets):
        if not any(ends_with(name, target) for name in names):
            raise ValueError(no_match("target_modules", target, names, model, _is_layer))
    # PEFT's files list every name that a task's head has in some family.
    heads = TASK_HEADS.get(getattr(config, "task_type", None), ())  # type: ignore[arg-type]
    has_head = any(ends_with(name, head) for name in names for head in heads)
    for wanted in getattr(config, "modules_to_save", None) or ():
        if not (has_head and wanted in heads) and not any(name.endswith(wanted) for name in names):
            raise ValueError(no_match("modules_to_save", wanted, names, model, lambda module: True))
    rows = getattr(config, "trainable_token_indices", None)
    for wanted in rows if isinstance(rows, dict) else ():
        if not any(ends_with(name, wanted) for name in names):
            raise ValueError(
                f"Target modules {{{wanted!r}}} not found in the base model. Please check the target modules and try "
                f"again. {no_match('trainable_token_indices', wanted, names, model, _is_layer)}"
            )
    missing = [target for target in own_parameters if not any(ends_with(name, target) for name in parameters)]
    if missing and len(missing) < len(own_parameters):
        raise ValueError(f"target_parameters: {missing[0]!r} matches no parameter; 3-D ones here: {fused}")


def check_unused_names(model: nn.Module, config: Any, targets: list[str]) -> None:
    """Warn of a name in exclude_modules that matches nothing, and of a pattern that matches no target, as PEFT does.

    For new adapters alone: a stored adapter is checked by its tensors, and its configuration may mention more names.
    """
    excluded = getattr(config, "exclude_modules", None)
    names = plain_module_names(model)
    excluding = [excluded] if isinstance(excluded, str) else sorted(excluded or ())
    unused = [name for name in excluding if not any(matches(module, name, excluded) for module in names)]
    if unused:
        near = no_match("exclude_modules", unused[0], names, model, lambda module: True)
        warnings.warn(
            f"You have passed exclude_modules={excluded} but no modules were excluded by {unused}. Please check that "
            f"exclude_modules was set correctly. {near}",
            stacklevel=2,
        )
    named = getattr(config, "target_parameters", None) or ()
    parameters = [f"{path}.{name}" for path, module in base_modules(model) for name in module._parameters]
    adapted = [*targets, *(name for name in parameters if any(ends_with(name, target) for target in named))]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field, None) or ()
        unused = [key for key in pattern if not any(re.match(rf"(.*\.)?({key})$", target) for target in adapted)]
        if unused:
            example = f" (they are such as {adapted[0]!r})" if adapted else ""
            warnings.warn(
                f"The following {field} keys did not match any targeted module{example} and were ignored: {unused}.",
                RuntimeWarning,
                stacklevel=2,
            )
    _warn_of_experts(model, config, adapted)


def _warn_of_experts(model: nn.Module, config: Any, adapted: list[str]) -> None:
    """Warn of names that take layers beside a mixture's routed experts, and not these, which are parameters."""
    targets = getattr(config, "target_modules", None) or ()
    excluded = getattr(config, "exclude_modules", None) or ()
    for path, module in base_modules(model):
        beside = path.rpartition(".")[0] + "."
        fused = [name for name in module._parameters if is_stack(module, name)]
        if not path or not fused or any(f"{path}.{name}" in adapted for name in fused):
            continue
        if any(matches(path, name, excluded) for name in ([excluded] if isinstance(excluded, str) else excluded)):
            continue
        for name in adapted:
            old = f"{path}.{name.rpartition('.')[2]}"  # what an expert's layer of this name would be called
            one = [targets] if isinstance(targets, str) else targets
            if name.startswith(beside) and "expert" in name and any(matches(old, t, targets) for t in one):
                warnings.warn(
                    f"target_modules takes {name!r}, but not the routed experts beside it, which are parameters of "
                    f"{path!r} and no layers: name them by target_parameters={fused}",
                    PeftWarning,
                    stacklevel=2,
                )
                return

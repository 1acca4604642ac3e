"""Matching names: the modules of a model that an adapter goes to, by PEFT's rules for `target_modules`.

A target is a name, the end of a dotted name, a regular expression that matches a whole name, or "all-linear". Unlike
PEFT, every name that is given must match something: a misspelt target would otherwise train nothing in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from minipeft.adapter import base_modules
from minipeft.config import TaskType
from minipeft.experts import packed
from minipeft.packed import PackedLayer

# Heads that start out random in these tasks, so that an adapter without them would be useless: saved whole.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def match_targets(
    model: nn.Module, config: Any, adaptable: Callable[[nn.Module], bool], skip: Iterable[str] = ()
) -> list[str]:
    """The dotted names of the modules that `config` adapts, in the model's order.

    Args:
        config: Its target_modules and, where it has them, exclude_modules, layers_to_transform and layers_pattern say
            which.
        adaptable: True for a module that the method can adapt.
        skip: Dotted names that are no targets, with all that lies under them.

    Raises ValueError when target_modules is empty, when nothing matches it, when it matches a module that cannot be
    adapted, and when nothing is left after the exclusions.
    """
    modules = dict(base_modules(model))
    names = [name for name in modules if name]
    targets = _targets_of(config)
    if targets == "all-linear":
        found = _inner_linear(model, modules, adaptable)
    elif isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
    else:
        ends = tuple(f".{target}" for target in targets)
        found = [name for name in names if f".{name}".endswith(ends)]
    if not found:
        raise ValueError(
            no_match("target_modules", targets if isinstance(targets, str) else targets[0], names, model, adaptable)
        )
    left = [name for name in found if not _excluded(name, config, skip) and _in_layers(name, config)]
    if not left:
        raise ValueError(
            f"target_modules {targets!r} matches {len(found)} modules, but exclude_modules, modules_to_save and "
            "layers_to_transform leave none of them (All modules were excluded: No modules were targeted for "
            "adaptation)"
        )
    for name in left:
        if may_not_be_called(modules, name):
            raise ValueError(
                f"target_modules: {name!r} is a layer whose weight its state-space mixer may read without calling it, "
                "so an adapter could be left out in silence; take in_proj"
            )
    return left


def matches(name: str, target: str, given: Any) -> bool:
    """True if `target`, one of the names `given` or an expression, takes the module called `name`."""
    return re.fullmatch(target, name) is not None if isinstance(given, str) else ends_with(name, target)


def check_target_module_exists(config: Any, key: str) -> bool:
    """True if the targets of `config` take a module called `key` (PEFT's function).

    Args:
        config: Its target_modules and, where it has them, exclude_modules, layers_to_transform and layers_pattern say
            which. "all-linear" is a name like others here: that a module is linear cannot be told from its name.
    """
    targets = config.target_modules
    named = _targets_of(config) if targets else []
    matched = matches(key, targets, targets) if isinstance(targets, str) else any(ends_with(key, t) for t in named)
    return matched and not _excluded(key, config, ()) and _in_layers(key, config)


def inspect_matched_modules(model: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The dotted names of the modules that an adapter's targets take, and of all others (PEFT's function).

    Returns: {"matched": [...], "unmatched": [...]}, in the model's order.

    Raises KeyError for an unknown adapter.
    """
    config = model.peft_config[adapter_name]
    sorted_out: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name in plain_module_names(model):
        sorted_out["matched" if check_target_module_exists(config, name) else "unmatched"].append(name)
    return sorted_out


def plain_module_names(model: nn.Module) -> list[str]:
    """Names of the base model's modules, without those that adapters added."""
    return [name for name, _ in base_modules(model) if name]


def _targets_of(config: Any) -> list[str] | str:
    if not config.target_modules:
        problem = "must be given" if config.target_modules is None else "is empty"
        raise ValueError(f"target_modules {problem}: name the modules to adapt, or give 'all-linear'")
    targets: Any = config.target_modules
    return targets if isinstance(targets, str) else sorted(targets)


def _inner_linear(model: Any, modules: Mapping[str, nn.Module], adaptable: Callable[[nn.Module], bool]) -> list[str]:
    """The names that "all-linear" takes: linear modules that are not (in) the output head, whatever the task."""
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear | PackedLayer) or is_conv1d(m)]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # RoBERTa's classifier is a module of two layers.
    heads = {head for heads in TASK_HEADS.values() for head in heads}
    inner = [n for n in linear if modules[n] is not output and heads.isdisjoint(n.split("."))]
    return [n for n in inner if n and adaptable(modules[n]) and not may_not_be_called(modules, n)]


def may_not_be_called(modules: Mapping[str, nn.Module], name: str) -> bool:
    """True for a layer of a state-space mixer other than in_proj: fused CUDA kernels are given weights, not layers.

    Args:
        modules: All of the model's, by name.
    """
    path, _, leaf = name.rpartition(".")
    mixer = modules[path]
    return leaf != "in_proj" and hasattr(mixer, "conv1d") and type(mixer).__name__.endswith("Mixer")


def is_conv1d(module: nn.Module) -> bool:
    """True if `module` is transformers' Conv1D (told by its name: methods do not import transformers)."""
    return bool([c for c in type(module).__mro__ if c.__name__ == "Conv1D" and "transformers" in c.__module__])


def ends_with(name: str, target: str) -> bool:
    """True if `target` is `name` or its end after a dot."""
    return name == target or name.endswith("." + target)


def _excluded(name: str, config: Any, skip: Iterable[str]) -> bool:
    if any(name == path or name.startswith(path + ".") for path in skip):
        return True
    excluded = getattr(config, "exclude_modules", None)
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(ends_with(name, exclude) for exclude in excluded or ())


def _in_layers(name: str, config: Any) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in list(filter(None, patterns or ())) or [r"[^.]*"]:
        # The first number counts: "layers.1.mlp.experts.0" lies in layer 1.
        number = re.match(rf"(?:.*?\.)??{pattern}\.(\d+)(?:\.|$)", name)
        if number:
            return int(number.group(1)) in wanted
    return False


def no_match(
    field: str, target: str, names: list[str], model: nn.Module, adaptable: Callable[[nn.Module], bool]
) -> str:
    """The error for `target`, which matches nothing, with the nearest of `names`."""
    message = f"{field}: {target!r} matches no module of {type(model).__name__}"
    parameters = [(name, p) for name, p in model.named_parameters() if ends_with(name, target)]
    if parameters:
        name, parameter = parameters[0]
        path, _, leaf = name.rpartition(".")
        stack, shape = packed(model.get_submodule(path), leaf), tuple(parameter.shape)
        if stack is not None:
            shape = (stack.experts, stack.rows, stack.columns)
        kind = "a parameter" if len(shape) < 3 else f"one parameter {shape} of all the experts"
        return f"{message}: {name} is {kind}, not a module: LoRA takes the experts' as target_parameters"
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    words = [leaf for leaf in leaves if not leaf.isdigit()]
    near = difflib.get_close_matches(target.rpartition(".")[2], words, n=3, cutoff=0.5)
    if near:
        return f"{message}; the nearest names are {', '.join(near)}"
    linear = dict.fromkeys(n.rpartition(".")[2] for n in names if adaptable(model.get_submodule(n)))
    return f"{message}; modules that can be adapted: {', '.join(linear) or 'none'}"


def modules_to_save(model: nn.Module, config: Any) -> list[str]:
    """The dotted names of the modules that `config` trains whole; a task's heads are added to its list."""
    if not hasattr(config, "modules_to_save"):
        return []
    names = plain_module_names(model)
    known_heads = TASK_HEADS.get(config.task_type, ())
    heads = [h for h in known_heads if any(ends_with(name, h) for name in names)]
    if heads:
        config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or ()), *heads])]
    # PEFT's rule for these: the end of a name, also within a word ("norm" takes every "input_layernorm").
    found = [name for name in names if name.endswith(tuple(config.modules_to_save or ()))]
    return [name for name in found if not name.startswith(tuple(f"{outer}." for outer in found))]

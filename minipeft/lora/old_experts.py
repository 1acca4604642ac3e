"""The experts of a mixture by the names that they had as modules of their own: `gate_proj`, or `w1`.

Where transformers 4 had a linear layer for every expert, transformers 5 has `gate_up_proj` and `down_proj`, a parameter
each for all the experts of a layer, and tells which layers it made them of. PEFT takes the old names for the new
parameters in many families. Here they mean the experts in every family that had such layers.
"""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

from torch import nn

from minipeft.adapter import base_modules
from minipeft.errors import PeftWarning
from minipeft.experts import has_interface, is_stack, linear_routers, weight_names
from minipeft.lora.config import LoraConfig
from minipeft.lora.experts import check_target_parameters
from minipeft.lora.find import lora_mixin_for
from minipeft.mixins import plain_class
from minipeft.renaming import Fused, converted_like, fused_parameters
from minipeft.shorter import _find_minimal_target_modules, shortest_names
from minipeft.targets import check_target_module_exists, ends_with, match_targets, matches, plain_module_names

# PEFT converts the configs of families whose checkpoints transformers converts as it does for these.
_CONVERTED_BY_PEFT = ("mixtral", "qwen2_moe")


def converted_by_peft(model: Any) -> bool:
    """True if PEFT converts what a config calls the experts of `model`."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind == "mixtral" or converted_like(kind) in _CONVERTED_BY_PEFT


def parameters_of_experts(model: Any) -> list[tuple[str, Fused]]:
    """The parameters that hold layers of all experts, each with the dotted name of its module."""
    held = [(path, name) for path, m in base_modules(model) for name in m._parameters if is_stack(m, name)]
    made = {fused.name: fused for fused in fused_parameters(model)} if held else {}
    return [(path, made[name]) for path, name in held if name in made]


def name_experts(model: Any, config: LoraConfig) -> None:
    """Move the experts that `target_modules` of a new adapter names as layers to its `target_parameters`, in place.

    In a family that PEFT converts, this is what PEFT does: the names mean the routed experts alone (a warning says
    which layers of these names are left out), `gate` means the routers, "all-linear" means both, too. In others the
    names mean the layers that have them, too. Unlike in PEFT, a longer name that is that of layers means those, and an
    expression, `exclude_modules` and `layers_to_transform` choose among the experts by their old names.

    A parameter made of n layers gets n times the rank and n times `lora_alpha`, as n adapters side by side have.

    Raises ValueError for a part of the layers that a parameter is made of, and as `check_target_parameters`.
    """
    given, everywhere = config.target_modules, parameters_of_experts(model)
    like_peft = bool(everywhere) and converted_by_peft(model)
    if not given or not everywhere or (not like_peft and (config.target_parameters or given == "all-linear")):
        return
    experts = [(path, fused) for path, fused in everywhere if _takes(model, config, path, fused)]
    routers = routers_of(model) if like_peft else []
    asked = [path for path in routers if _named(given, path)]
    if asked and given == "all-linear" and config.lora_dropout:
        warnings.warn(
            f"target_modules='all-linear' leaves out the routers of {type(model).__name__}, whose weight is read "
            f"updated: lora_dropout={config.lora_dropout} has no place there",
            PeftWarning,
            stacklevel=2,
        )
        asked = []
    layers = {layer for _, fused in experts for layer in fused.layers}
    left_out = _keep_others(model, config, layers, asked, like_peft) if experts or asked or like_peft else []
    if not experts and not asked:
        return
    for fused in dict.fromkeys(fused for _, fused in experts if len(fused.layers) > 1):
        times, key = len(fused.layers), rf".*\.{re.escape(fused.name)}"
        config.rank_pattern = {**config.rank_pattern, key: times * config.r}
        config.alpha_pattern = {**config.alpha_pattern, key: times * config.lora_alpha}
    new = short_names(
        [(path, fused.name) for path, fused in experts], [(path, fused.name) for path, fused in everywhere]
    )
    new += short_names([(path, "gate.weight") for path in asked], [(path, "gate.weight") for path in routers])
    config.target_parameters = [*dict.fromkeys([*(config.target_parameters or ()), *new])]
    try:
        check_target_parameters(config)
    except ValueError as error:
        raise ValueError(
            f"target_modules: {', '.join(sorted(layers)) or 'gate'} of the experts of {type(model).__name__} are no "
            f"layers, but lie in parameters: {error}"
        ) from error
    if left_out:
        warnings.warn(
            f"target_modules: {', '.join(sorted(layers))} mean the routed experts of {type(model).__name__} alone, as "
            f"in PEFT. {len(left_out)} layers of these names are left out, such as {left_out[-1]!r}: give a longer "
            f"name ({'.'.join(left_out[-1].split('.')[-2:])!r}) for those, too.",
            PeftWarning,
            stacklevel=2,
        )


def take_experts(model: Any, config: LoraConfig) -> None:
    """Let "all-linear" of a new adapter mean the linear layers and the experts of `model`, never its routers, in place.

    Experts whose class does not say how they are computed are left out, and a warning names them.
    """
    if config.target_modules != "all-linear" or config.target_parameters:
        return
    everywhere, left_out = [], []
    for path, module in base_modules(model):
        fused = [name for name in module._parameters if is_stack(module, name)]
        if has_interface(module):
            everywhere += [(path, name) for name in weight_names(module)]
        elif fused and "Experts" in plain_class(module).__name__:
            left_out.append(f"{path!r} ({', '.join(fused)})")
    if left_out:
        warnings.warn(
            f"target_modules='all-linear' leaves out experts of {type(model).__name__}, such as {left_out[-1]}: LoRA "
            "would form every expert's updated weight in each step. target_parameters takes them",
            PeftWarning,
            stacklevel=2,
        )
    experts = [one for one in everywhere if _is_wanted(config, one[0]) and _is_wanted(config, ".".join(one))]
    routers = linear_routers(model)
    if not experts and not routers:
        return
    targets = match_targets(model, config, lambda module: lora_mixin_for(module) is not None)
    targets = [name for name in targets if name not in routers]
    # Names that experts' layers had in former times would mean those in PEFT's families, and these layers no more.
    old = [
        f"{path}.{layer}"
        for path, fused in parameters_of_experts(model)
        for name in fused.layers
        for layer in (name, f"0.{name}")
    ]
    others = [name for name in plain_module_names(model) if name not in targets]
    config.target_modules = _find_minimal_target_modules(targets, [*others, *old])
    config.target_parameters = short_names(experts, everywhere) or None


def _is_wanted(config: LoraConfig, path: str) -> bool:
    """True unless `exclude_modules` or `layers_to_transform` leave out what is at `path`."""
    scope = copy.copy(config)
    scope.target_modules = [_leaf(path)]
    return bool(check_target_module_exists(scope, path))


def _takes(model: Any, config: LoraConfig, path: str, fused: Fused) -> bool:
    """True if `config` names all the layers that `fused`, a parameter of the module at `path`, is made of.

    Raises ValueError if it names a part of them.
    """
    given, scope = config.target_modules, copy.copy(config)
    longer = [] if isinstance(given, str) else [target for target in given or () if "." in target]
    # Longer names that no layer has now, such as "experts.0.down_proj".
    old = [target for target in longer if not any(ends_with(name, target) for name in plain_module_names(model))]
    named = []
    for layer in fused.layers:
        scope.target_modules = [layer]
        here = any(_named(given, f"{path}.{name}") for name in (layer, f"0.{layer}"))
        if (here or any(ends_with(target, layer) for target in old)) and check_target_module_exists(
            scope, f"{path}.{layer}"
        ):
            named.append(layer)
    if 0 < len(named) < len(fused.layers):
        missing = ", ".join(layer for layer in fused.layers if layer not in named)
        raise ValueError(
            f"Cannot convert PEFT target(s) {', '.join(named)} without also targeting {missing} because they are fused "
            f"into {fused.name}. Name them all, or the longer names of layers that are no experts"
        )
    return bool(named)


def _keep_others(model: Any, config: LoraConfig, layers: set[str], routers: list[str], like_peft: bool) -> list[str]:
    """Take the old names of experts, `layers`, and of `routers` out of `config.target_modules`.

    Returns: the modules that it took and takes no more.
    """
    given, names = config.target_modules, plain_module_names(model)
    left_out: list[str] = []
    if isinstance(given, str):
        if given == "all-linear":
            taken = match_targets(model, config, lambda module: lora_mixin_for(module) is not None)
        else:
            taken = [name for name in names if re.fullmatch(given, name)]
        if like_peft and (taken or layers):
            # As names, since PEFT makes the last parts of an expression's names of it, wherever they are.
            left_out = [name for name in taken if _leaf(name) in layers]
            config.target_modules = set(shortest_names(model, [n for n in taken if n not in {*left_out, *routers}]))
        elif not taken and layers:
            config.target_modules = set()
    else:
        kept = set()
        for target in given or ():
            taken = [name for name in names if ends_with(name, target) and name not in routers]
            if like_peft and target in layers:
                left_out += taken
            elif taken or not (_leaf(target) in layers or any(ends_with(path, target) for path in routers)):
                kept.add(target)
        config.target_modules = kept
    if not config.target_modules:
        # They have chosen among the experts, and no layer is left to choose among.
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return left_out


def short_names(chosen: list[tuple[str, str]], everywhere: list[tuple[str, str]]) -> list[str]:
    """Names of `chosen` parameters, (module, parameter) each: the parameter's alone if it is chosen everywhere."""
    partly = {name for path, name in everywhere if (path, name) not in chosen}
    return list(dict.fromkeys(f"{path}.{name}" if name in partly else name for path, name in chosen))


def _named(given: Any, path: str) -> bool:
    """True if `given`, as target_modules, takes a layer of an expert or a router at `path`."""
    return given == "all-linear" or any(
        matches(path, target, given) for target in ([given] if isinstance(given, str) else given)
    )


def routers_of(model: nn.Module) -> list[str]:
    """The modules called `gate` that choose experts by a weight of their own and are no linear layers."""
    gates = [(path, module) for path, module in base_modules(model) if _leaf(path) == "gate"]
    return [path for path, gate in gates if not isinstance(gate, nn.Linear) and _is_matrix(gate)]


def _is_matrix(gate: nn.Module) -> bool:
    weight = gate._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]

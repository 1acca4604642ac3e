"""Adapters from when a mixture's experts were layers (`experts.0.w1`), for models that have them in parameters.

A parameter that is made of n layers has the update of n adapters side by side: for each expert A = [A_1; ...; A_n] and
B = diag(B_1, ..., B_n), of all their ranks together. This is also how PEFT 0.21 reads such files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minipeft.adapter import base_modules
from minipeft.lora.config import LoraConfig
from minipeft.lora.old_experts import parameters_of_experts, routers_of, short_names
from minipeft.renaming import Fused, renamings
from minipeft.shorter import shortest_names
from minipeft.targets import check_target_module_exists


@dataclasses.dataclass
class _Layer:
    """LoRA of one layer of one expert: A (r, in_features), B (out_features, r), and the config's word on it."""

    r: int
    alpha: float
    scaling: float
    factors: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def of_today(model: Any, config: LoraConfig, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file, with those of single experts put together as the parameters of `model` have them.

    If there are such tensors, `config` is made to say what they are, in place: its targets, ranks and scalings. An
    expert or a layer that has none gets zeros. Targets that match none of the modules that the tensors are of, by the
    names that these have today, become their names. DoRA's lengths lose the `.weight` that some files have.

    Args:
        stored: Tensors by their names on disk.

    Raises ValueError for a factor that is missing or does not fit, or is not of the rank that `config` says.
    """
    stored = {re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name): tensor for name, tensor in stored.items()}
    everywhere, modules = parameters_of_experts(model), {path for path, _ in base_modules(model)}
    if not everywhere and all(_module_of(name, config) in modules for name in stored if ".lora_" in name):
        return stored
    layers, rest, adapted = _sorted_out(model, config, stored, everywhere)
    if not layers:
        named = config.target_parameters or any(check_target_module_exists(config, path) for path in adapted)
        if adapted and config.target_modules not in (None, "all-linear") and not named:
            config.target_modules = set(shortest_names(model, sorted(adapted)))
        return stored
    routers = [path for path in routers_of(model) if path in adapted]
    config.target_modules = set(shortest_names(model, sorted(adapted - {*routers})))
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    short = short_names(
        [(path, fused.name) for path, fused in layers], [(path, fused.name) for path, fused in everywhere]
    )
    short += short_names(
        [(path, "gate.weight") for path in routers], [(path, "gate.weight") for path in routers_of(model)]
    )
    config.target_parameters = [*dict.fromkeys([*(config.target_parameters or ()), *short])]
    _set_ranks(config, layers)
    for (path, fused), single in layers.items():
        module = model.get_submodule(path)
        # PEFT wraps a module once for each parameter, the last one outermost.
        targeted = [name for name in module._parameters if any(p == path and f.name == name for p, f in layers)]
        depth = len(targeted) - 1 - targeted.index(fused.name)
        A, B = _side_by_side(config, path, fused, single, module._parameters[fused.name])
        inside = f"{config.key_prefix}{path}.{'base_layer.' * depth}lora_"
        rest |= {f"{inside}A.weight": A, f"{inside}B.weight": B}
    return rest


def _module_of(name: str, config: LoraConfig) -> str:
    return name.removeprefix(config.key_prefix).partition(".lora_")[0]


def _sorted_out(
    model: Any, config: LoraConfig, stored: Mapping[str, Tensor], everywhere: list[tuple[str, Fused]]
) -> tuple[dict[tuple[str, Fused], dict[tuple[int, str], _Layer]], dict[str, Tensor], set[str]]:
    """The factors of single experts by parameter, expert and layer; all other tensors, and the modules these are of."""
    modules, prefix = {path for path, _ in base_modules(model)}, config.key_prefix
    layers: dict[tuple[str, Fused], dict[tuple[int, str], _Layer]] = {}
    rest, adapted = dict(stored), set()
    names: list[Callable[[str], str]] = [lambda name: name, *renamings(model)]
    for stored_name in stored:
        name = stored_name.removeprefix(prefix)
        for today in names:
            path, _, factor = today(name).partition(".lora_")
            holder, expert, layer = [*path.rsplit(".", 2), "", ""][:3]
            fused = next((f for other, f in everywhere if other == holder and layer in f.layers), None)
            if fused is not None and expert.isdigit() and factor in ("A.weight", "B.weight"):
                # The patterns of the config are about the names in the file.
                own = _Layer(*config.settings_for(name.partition(".lora_")[0]))
                own = layers.setdefault((holder, fused), {}).setdefault((int(expert), layer), own)
                own.factors[factor[0]] = rest.pop(stored_name)
                break
            if path in modules and factor:
                adapted.add(path)
                break
    return layers, rest, adapted


def _ranks(fused: Fused, single: Mapping[tuple[int, str], _Layer]) -> list[int]:
    """The rank of each layer that `fused` is made of, the largest of all experts'."""
    return [max((one.r for (_, layer), one in single.items() if layer == name), default=0) for name in fused.layers]


def _set_ranks(config: LoraConfig, layers: Mapping[tuple[str, Fused], Mapping[tuple[int, str], _Layer]]) -> None:
    """Give every parameter the rank of its layers together, and a `lora_alpha` that keeps alpha / r."""
    settings = {}
    for (path, fused), single in layers.items():
        first, r = next(iter(single.values())), sum(_ranks(fused, single))
        alpha = first.alpha * r / first.r
        settings[path, fused] = (r, int(alpha) if alpha == int(alpha) else alpha)
    for (path, fused), own in settings.items():
        alike = all(other == own for (_, f), other in settings.items() if f == fused)
        key = rf".*\.{re.escape(fused.name)}" if alike else re.escape(f"{path}.{fused.name}")
        if config.settings_for(f"{path}.{fused.name}")[:2] != own:
            config.rank_pattern = {key: own[0], **config.rank_pattern}
            config.alpha_pattern = {key: own[1], **config.alpha_pattern}


def _side_by_side(
    config: LoraConfig, path: str, fused: Fused, single: Mapping[tuple[int, str], _Layer], parameter: Any
) -> tuple[Tensor, Tensor]:
    """A (experts * r, in_features) and B (out_features, r * experts) of the parameter `fused` at `path`.

    With rsLoRA the scaling of the whole is not that of its layers: B makes up for it.
    """
    experts, out_features, in_features = parameter.shape
    each, ranks = out_features // len(fused.layers), _ranks(fused, single)
    scaling = config.settings_for(f"{path}.{fused.name}")[2]
    dtype = next(tensor.dtype for one in single.values() for tensor in one.factors.values())
    A = torch.zeros(experts, sum(ranks), in_features, dtype=dtype)
    B = torch.zeros(experts, out_features, sum(ranks), dtype=dtype)
    for (expert, layer), one in single.items():
        for name, shape in (("A", (one.r, in_features)), ("B", (each, one.r))):
            given = tuple(one.factors[name].shape) if name in one.factors else None
            if given != shape or expert >= experts:
                raise ValueError(
                    f"{path}.{expert}.{layer}.lora_{name}.weight: the shape is {given}, expected {shape}; there are "
                    f"{experts} experts"
                )
        place = fused.layers.index(layer)
        columns = slice(sum(ranks[:place]), sum(ranks[:place]) + one.r)
        A[expert, columns] = one.factors["A"]
        B[expert, place * each : (place + 1) * each, columns] = one.factors["B"] * (one.scaling / scaling)
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)

"""Adapting a model in place: find the targets, freeze the rest, put mixins in, take them out again.

Matching follows PEFT's rules for `target_modules` (a name, the end of a dotted name, a regular expression that
matches a whole name, "all-linear"). Unlike PEFT, every name that is given must match something: a misspelt target
would otherwise train nothing in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from minipeft.configs import TaskType
from minipeft.methods.base import AdapterModule, Switch, mix_in
from minipeft.methods.lora import is_conv1d, lora_mixin_for
from minipeft.methods.lora_config import LoraConfig
from minipeft.methods.trained_copies import TrainedBias, TrainedModule
from minipeft.quantization import NF4Linear

# What PEFT targets when target_modules is not given, by transformers' `config.model_type`.
DEFAULT_TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gemma": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "smollm3": ["q_proj", "v_proj"],
    "olmo2": ["q_proj", "v_proj"],
    "granite": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "t5": ["q", "v"],
}

# Heads that start out random in these tasks, so that an adapter without them would be useless: saved whole.
TASK_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """The adapted modules of `model` with their dotted names."""
    for path, module in model.named_modules():
        if isinstance(module, AdapterModule):
            yield path, module


def switch_of(model: nn.Module) -> Switch:
    """The switch that the adapted modules of `model` share, or a new one if there are none."""
    return next((module.switch for _, module in adapter_modules(model)), Switch())


def attach_adapter(
    model: nn.Module,
    config: LoraConfig,
    adapter: str,
    switch: Switch,
    autocast_adapter_dtype: bool = True,
    init: bool = True,
) -> None:
    """Add `adapter` to `model`: mix what is missing into its targets and create the tensors, trainable.

    `config.target_modules` and `config.modules_to_save` are filled in where they were left to us. Nothing is changed
    when a name does not match: all checks come first.

    Raises ValueError for an invalid adapter name, names that match nothing, and targets that cannot be adapted.
    """
    check_adapter_name(adapter)
    saved = _modules_to_save(model, config)
    targets = match_targets(model, config, skip=saved)
    _check_saved(model, saved)
    _check_targets(model, targets)
    for path in saved:
        module: Any = model.get_submodule(path)
        _become(module, TrainedModule, switch)
        module.add_copy(adapter, _adapter_dtype(module, autocast_adapter_dtype))
    for path in targets:
        module = model.get_submodule(path)
        mixin = lora_mixin_for(module)
        assert mixin is not None
        _become(module, mixin, switch)
        module.add_adapter(adapter, config, path, _adapter_dtype(module, autocast_adapter_dtype), init)
    if config.bias == "all":
        _train_all_biases(model, adapter, switch, autocast_adapter_dtype)
    config.target_modules = (
        _shortest_names(model, targets) if config.target_modules == "all-linear" else config.target_modules
    )


def freeze(model: nn.Module) -> None:
    """Turn off the gradient of every parameter."""
    for parameter in model.parameters():
        parameter.requires_grad = False


def check_adapter_name(adapter: str) -> None:
    """Raise ValueError unless `adapter` can be part of parameter names and be a folder's name."""
    if not isinstance(adapter, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", adapter):
        raise ValueError(f"adapter name {adapter!r} must be made of letters, digits, '_' and '-'")


# Matching


def match_targets(model: nn.Module, config: LoraConfig, skip: Iterable[str] = ()) -> list[str]:
    """The dotted names of the modules that `config` adapts, in the model's order.

    Raises ValueError when a name in target_modules matches nothing, or nothing is left after the exclusions.
    """
    names = _plain_module_names(model)
    targets = _targets_or_default(model, config)
    if targets == "all-linear":
        found = [name for name in names if _is_inner_linear(model, name)]
    elif isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
    else:
        for target in targets:
            if not any(_ends_with(name, target) for name in names):
                raise ValueError(_no_match("target_modules", target, names, model))
        found = [name for name in names if any(_ends_with(name, target) for target in targets)]
    if not found:
        raise ValueError(_no_match("target_modules", str(targets), names, model))
    left = [name for name in found if not _excluded(name, config, skip) and _in_layers(name, config)]
    if not left:
        raise ValueError(
            f"target_modules {targets!r} matches {len(found)} modules, but exclude_modules, modules_to_save and "
            "layers_to_transform leave none of them"
        )
    return left


def _plain_module_names(model: nn.Module) -> list[str]:
    """Names of the model's own modules: what adapters added is left out."""
    inside: list[str] = []
    names = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        names.append(name)
        if isinstance(module, AdapterModule):
            inside += [f"{name}.{own}" for own in module._own_attributes]
    return names


def _targets_or_default(model: nn.Module, config: LoraConfig) -> list[str] | str:
    if config.target_modules is None:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if family not in DEFAULT_TARGETS:
            raise ValueError(f"target_modules must be given: there is no usual choice for model type {family!r}")
        config.target_modules = list(DEFAULT_TARGETS[family])
    if not config.target_modules:
        raise ValueError("target_modules is empty: name the modules to adapt, or give 'all-linear'")
    return config.target_modules


def _is_inner_linear(model: Any, name: str) -> bool:
    """Whether "all-linear" takes this module: linear, and not the output head."""
    module = model.get_submodule(name)
    if not (isinstance(module, nn.Linear | NF4Linear) or is_conv1d(module)) or lora_mixin_for(module) is None:
        return False
    heads = {head for heads in TASK_HEADS.values() for head in heads}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module is not output and name.rpartition(".")[2] not in heads


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _excluded(name: str, config: LoraConfig, skip: Iterable[str]) -> bool:
    if any(name == path or name.startswith(path + ".") for path in skip):
        return True
    if isinstance(config.exclude_modules, str):
        return re.fullmatch(config.exclude_modules, name) is not None
    return any(_ends_with(name, exclude) for exclude in config.exclude_modules or ())


def _in_layers(name: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or [r"[^.]*"]:
        number = re.match(rf".*\.{pattern}\.(\d+)\.", name) or re.match(rf"{pattern}\.(\d+)\.", name)
        if number:
            return int(number.group(1)) in wanted
    return False


def _no_match(field: str, target: str, names: list[str], model: nn.Module) -> str:
    message = f"{field}: {target!r} matches no module of {type(model).__name__}"
    parameters = [name for name, _ in model.named_parameters() if _ends_with(name, target)]
    if parameters:
        return f"{message}: {parameters[0]} is a parameter, not a module, and cannot be a target here"
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    words = [leaf for leaf in leaves if not leaf.isdigit()]
    near = difflib.get_close_matches(target.rpartition(".")[2], words, n=3, cutoff=0.5)
    if near:
        return f"{message}; the nearest names are {', '.join(near)}"
    linear = dict.fromkeys(n.rpartition(".")[2] for n in names if lora_mixin_for(model.get_submodule(n)) is not None)
    return f"{message}; modules that can be adapted: {', '.join(linear) or 'none'}"


def _shortest_names(model: nn.Module, targets: list[str]) -> list[str]:
    """Names that select exactly `targets`: last parts where those suffice, whole names elsewhere."""
    names, chosen = _plain_module_names(model), set(targets)
    taken: dict[str, bool] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        taken[leaf] = taken.get(leaf, True) and name in chosen
    return sorted({t.rpartition(".")[2] if taken[t.rpartition(".")[2]] else t for t in targets})


# Changing modules


def _modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    names = _plain_module_names(model)
    for wanted in config.modules_to_save or ():
        if not any(_ends_with(name, wanted) for name in names):
            raise ValueError(_no_match("modules_to_save", wanted, names, model))
    heads = TASK_HEADS.get(config.task_type, ())  # type: ignore[call-overload]
    heads = [head for head in heads if any(_ends_with(name, head) for name in names)]
    if heads:
        config.modules_to_save = [*dict.fromkeys([*(config.modules_to_save or ()), *heads])]
    return [name for name in names if any(_ends_with(name, w) for w in config.modules_to_save or ())]


def _check_saved(model: nn.Module, saved: list[str]) -> None:
    for path in saved:
        module = model.get_submodule(path)
        if isinstance(module, AdapterModule) and not isinstance(module, TrainedModule):
            raise ValueError(f"modules_to_save: {path!r} already carries another adapter's {type(module).__name__}")
        packed = [n for n, p in module.named_parameters() if not p.is_floating_point()]
        if packed:
            raise ValueError(f"modules_to_save: {path!r} is quantized ({packed[0]}), so it cannot be trained whole")


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    for path in targets:
        module = model.get_submodule(path)
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        if lora_mixin_for(module) is None:
            raise ValueError(
                f"target_modules: {path!r} is a {type(module).__module__}.{type(module).__name__}; LoRA adapts "
                "torch.nn.Linear, torch.nn.Embedding, transformers' Conv1D and minipeft's NF4Linear"
            )


def _become(module: Any, mixin: type[AdapterModule], switch: Switch) -> None:
    """Make `module` an instance of `mixin`, keeping what another adapter already has there."""
    if isinstance(module, mixin):
        return
    biases = module.trained_bias if isinstance(module, TrainedBias) else None
    if isinstance(module, AdapterModule):
        module.detach()
    mix_in(module, mixin, f"{mixin.name_prefix}{type(module).__name__}")
    module.attach(switch)
    if biases is not None:
        module.trained_bias = biases


def _train_all_biases(model: nn.Module, adapter: str, switch: Switch, autocast: bool) -> None:
    for name in _plain_module_names(model):
        module = model.get_submodule(name)
        if module._parameters.get("bias") is None or isinstance(module, TrainedModule):
            continue
        if isinstance(module, TrainedBias) and adapter in module.trained_bias:
            continue
        if not isinstance(module, TrainedBias):
            _become(module, TrainedBias, switch)
        assert isinstance(module, TrainedBias)
        module.train_bias(adapter, _adapter_dtype(module, autocast))


def _adapter_dtype(module: nn.Module, autocast: bool) -> torch.dtype:
    """float32 over a 16-bit or 4-bit module, unless `autocast` is off: then the module's own."""
    if isinstance(module, NF4Linear):
        own = module.nf4_weight().dtype
    else:
        own = next(p.dtype for p in module.parameters())
    return torch.float32 if autocast and own in (torch.float16, torch.bfloat16) else own

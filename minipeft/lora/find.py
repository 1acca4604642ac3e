"""The modules of a model that a LoRA config adapts, and the mixin for each: how LoRA attaches."""

from __future__ import annotations

import functools
import warnings
from typing import NoReturn

from torch import nn

from minipeft.adapter import Method, Part, base_modules
from minipeft.copies import TrainedModule
from minipeft.errors import PeftWarning
from minipeft.lora.attention import LoraMultiheadAttention, LoraNeverCalled
from minipeft.lora.config import LoraConfig
from minipeft.lora.conv import conv_mixin_for
from minipeft.lora.default_targets import usual_targets
from minipeft.lora.experts import LoraParameters, check_target_parameters, find_target_parameters
from minipeft.lora.head import head_parts
from minipeft.lora.layer import LoraLayer
from minipeft.lora.layers import LoraConv1D, LoraEmbedding, LoraLinear, LoraNF4Linear
from minipeft.lora.replication import check_replicated
from minipeft.lora.tying import tied_parts, tied_with
from minipeft.mixins import plain_class
from minipeft.nf4 import NF4Linear
from minipeft.shorter import shortened, shortest_names
from minipeft.targets import check_target_module_exists, is_conv1d, match_targets, may_not_be_called
from minipeft.tokens.find import named_rows, row_parts
from minipeft.tokens.layer import DELTA


def lora_mixin_for(module: nn.Module) -> type[LoraLayer] | None:
    """The mixin that adapts `module`, or None if LoRA cannot."""
    if isinstance(module, NF4Linear):
        return LoraNF4Linear
    if _eight_bits(module):
        return None
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return conv_mixin_for(module)
    if is_conv1d(module):
        return LoraConv1D
    if isinstance(module, nn.MultiheadAttention):
        return LoraMultiheadAttention
    # Llama 4's router is an nn.Linear that returns two things.
    if "Router" in type(module).__name__:
        return None
    # bitsandbytes' layers are nn.Linear with a packed weight: an update would be wrong.
    if isinstance(module, nn.Linear) and module.weight.shape == (module.out_features, module.in_features):
        return LoraLinear
    return None


def _eight_bits(module: nn.Module) -> bool:
    """True if the weight is 8-bit codes (bitsandbytes' int8, FP8) and not numbers: an update added would be wrong."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.element_size() == 1


_ROUTER = ", the router of a mixture of experts, whose weight target_parameters takes"


def _find_targets(model: nn.Module, config: LoraConfig, skip: list[str]) -> list[str]:
    check_replicated(model, config.layer_replication)
    if not config.target_parameters:
        return _find_layers(model, config, skip)
    check_target_parameters(config)
    # As in PEFT, a config that names parameters and no modules adapts the parameters alone.
    return _find_layers(model, config, skip) if config.target_modules else []


def _passed_by(model: nn.Module) -> list[nn.Module]:
    """The layers that nn.MultiheadAttention reads the weight of without calling them: an update would be lost."""
    return [part.out_proj for _, part in base_modules(model) if isinstance(part, nn.MultiheadAttention)]


def _find_layers(model: nn.Module, config: LoraConfig, skip: list[str]) -> list[str]:
    if config.target_modules is None:
        config.target_modules = usual_targets(model)
    passed_by = _passed_by(model)
    never_called = _never_called(model, config)
    if config.target_modules == "all-linear":
        # They would be left out in silence, since they cannot be adapted.
        for path, module in base_modules(model):
            if isinstance(module, nn.Linear) and not isinstance(module, NF4Linear) and _eight_bits(module):
                _refuse(path, module)

    def adaptable(module: nn.Module) -> bool:
        mixin = config.own_mixin(module) or lora_mixin_for(module)
        return mixin is not None and all(module is not part for part in passed_by)

    targets = match_targets(model, config, adaptable, [*skip, *tied_with(model, config, skip)])
    others = [path for path in targets if path not in never_called]
    if others and never_called and not any(path.rpartition(".")[0] in others for path in never_called):
        warnings.warn(
            f"target_modules: {never_called} are read by their nn.MultiheadAttention and not called, so their updates "
            "never act, as in PEFT; take the whole module, of which they are adapted too, or exclude_modules",
            PeftWarning,
            stacklevel=2,
        )
        targets = others
    targets += [path for path in tied_with(model, config, targets) if path not in targets]
    for path in targets:
        module = model.get_submodule(path)
        if any(module is part for part in passed_by):
            raise ValueError(
                f"target_modules: {path!r} is read by its nn.MultiheadAttention and not called; take "
                f"{path.rpartition('.')[0]!r}, the whole module, of which it is adapted too"
            )
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        mixin, known = config.own_mixin(module), lora_mixin_for(module)
        if mixin is not None and known is None:
            kind = plain_class(module)
            warnings.warn(f"Unsupported layer type '{kind}' encountered, proceed at your own risk.", stacklevel=2)
        mixin = mixin or known
        if mixin is None:
            _refuse(path, module)
        mixin.check(module, path, config)
    if config.target_modules == "all-linear":
        config.target_modules = set(shortest_names(model, targets))
    else:
        config.target_modules = shortened(model, config.target_modules)
    return targets


def _never_called(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the layers that `config` names and nn.MultiheadAttention reads without calling them."""
    passed_by = _passed_by(model) if config.target_modules and config.target_modules != "all-linear" else []
    paths = [path for path, module in base_modules(model) if any(module is part for part in passed_by)]
    return [path for path in paths if check_target_module_exists(config, path)]


def _refuse(path: str, module: nn.Module) -> NoReturn:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if kind.startswith("bitsandbytes."):
        raise ValueError(f"{path!r} is a {kind}: load the model with minipeft's BitsAndBytesConfig, in 4 bits, instead")
    if _eight_bits(module):
        raise ValueError(
            f"target_modules: {path!r} is a {kind} with an 8-bit weight ({module.weight.dtype}), which LoRA does not "
            "adapt: load the model in 16 bits, or in 4 by minipeft's BitsAndBytesConfig"
        )
    raise ValueError(
        f"target_modules: {path!r} is a {kind}{_ROUTER if 'Router' in kind else ''}; LoRA adapts "
        "torch.nn.Linear, Embedding, Conv1d to Conv3d and MultiheadAttention, transformers' Conv1D and "
        "minipeft's NF4Linear"
    )


def _parts(model: nn.Module, config: LoraConfig, saved: list[str], targets: list[str]) -> list[Part]:
    parts = [*head_parts(model, targets), *tied_parts(model, config, saved, targets)]
    for path in _never_called(model, config) if targets else ():
        hold = functools.partial(LoraNeverCalled.hold_factors, config=config, path=path)
        parts.append(Part(path, LoraNeverCalled, hold))
    saved = list(dict.fromkeys([*saved, *tied_with(model, config, saved)]))
    if config.target_parameters:
        modules = dict(base_modules(model))
        passed_by = _passed_by(model)

        def never_read(path: str) -> bool:
            return any(modules[path] is part for part in passed_by) or may_not_be_called(modules, path)

        for path in find_target_parameters(modules, config, targets, never_read):
            add = functools.partial(LoraParameters.add_factors, config=config, path=path)
            parts.append(Part(path, LoraParameters, add))
    if config.trainable_token_indices is not None:
        wanted, taken = named_rows(model, config.trainable_token_indices), [*targets, *(part.path for part in parts)]
        key = f"token_adapter.{DELTA}"
        parts += row_parts(model, wanted, key, taken, saved, config.ensure_weight_tying)
    return parts


LORA = Method(find=_find_targets, mixin_for=lora_mixin_for, parts=_parts)

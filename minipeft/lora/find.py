"""The modules of a model that a LoRA config adapts, and the mixin for each: how LoRA attaches."""

from __future__ import annotations

from torch import nn

from minipeft.adapter import AdapterModule, Method, Part, base_modules
from minipeft.copies import TrainedModule
from minipeft.lora.attention import LoraMultiheadAttention
from minipeft.lora.config import LoraConfig
from minipeft.lora.conv import conv_mixin_for
from minipeft.lora.default_targets import usual_targets
from minipeft.lora.experts import LoraParameters, check_target_parameters, find_target_parameters
from minipeft.lora.layer import LoraLayer
from minipeft.lora.layers import LoraConv1D, LoraEmbedding, LoraLinear, LoraNF4Linear
from minipeft.nf4 import NF4Linear
from minipeft.targets import is_conv1d, match_targets, shortest_names
from minipeft.tokens.find import named_rows, row_parts
from minipeft.tokens.layer import DELTA


def lora_mixin_for(module: nn.Module) -> type[LoraLayer] | None:
    """The mixin that adapts `module`, or None if LoRA cannot."""
    if isinstance(module, NF4Linear):
        return LoraNF4Linear
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


_ROUTER = ", the router of a mixture of experts, whose weight target_parameters takes"


def _mixin_for(module: nn.Module) -> type[AdapterModule] | None:
    """`lora_mixin_for`, and for a module that holds parameters for `target_parameters` `LoraParameters`."""
    fused = any(p is not None and p.dim() >= 2 for p in module._parameters.values())
    return lora_mixin_for(module) or (LoraParameters if fused else None)


def _reads_its_own(module: nn.Module) -> bool:
    """True if a 2-D weight of `module` is read in the module's own forward, where an update of it can stand in."""
    plain_layer = isinstance(module, nn.Linear) and "Router" not in type(module).__name__
    return lora_mixin_for(module) is None and not plain_layer


def _find_targets(model: nn.Module, config: LoraConfig, skip: list[str]) -> list[str]:
    if not config.target_parameters:
        return _find_layers(model, config, skip)
    check_target_parameters(config)
    holders = find_target_parameters(dict(base_modules(model)), config, _reads_its_own)
    # As in PEFT, a config that names parameters and no modules adapts the parameters alone.
    return [*(_find_layers(model, config, skip) if config.target_modules else ()), *holders]


def _find_layers(model: nn.Module, config: LoraConfig, skip: list[str]) -> list[str]:
    if config.target_modules is None:
        config.target_modules = set(usual_targets(model))
    # nn.MultiheadAttention reads its out_proj's weight without calling it: an update beside it would be lost.
    passed_by = [part.out_proj for _, part in base_modules(model) if isinstance(part, nn.MultiheadAttention)]

    def adaptable(module: nn.Module) -> bool:
        return lora_mixin_for(module) is not None and all(module is not part for part in passed_by)

    targets = match_targets(model, config, adaptable, skip)
    for path in targets:
        module = model.get_submodule(path)
        if any(module is part for part in passed_by):
            raise ValueError(
                f"target_modules: {path!r} is read by its nn.MultiheadAttention and not called; take "
                f"{path.rpartition('.')[0]!r}, the whole module, of which it is adapted too"
            )
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        mixin = lora_mixin_for(module)
        if mixin is None:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            if kind.startswith("bitsandbytes."):
                raise ValueError(f"{path!r} is a {kind}: load the model with minipeft's BitsAndBytesConfig instead")
            raise ValueError(
                f"target_modules: {path!r} is a {kind}{_ROUTER if 'Router' in kind else ''}; LoRA adapts "
                "torch.nn.Linear, Embedding, Conv1d to Conv3d and MultiheadAttention, transformers' Conv1D and "
                "minipeft's NF4Linear"
            )
        mixin.check(module, path, config)
    if config.target_modules == "all-linear":
        config.target_modules = set(shortest_names(model, targets))
    return targets


def _parts(model: nn.Module, config: LoraConfig, saved: list[str], targets: list[str]) -> list[Part]:
    if config.trainable_token_indices is None:
        return []
    wanted = named_rows(model, config.trainable_token_indices)
    return row_parts(model, wanted, f"token_adapter.{DELTA}", targets, saved, config.ensure_weight_tying)


LORA = Method(find=_find_targets, mixin_for=_mixin_for, parts=_parts)

"""The modules of a model that a LoRA config adapts, and the mixin for each: how LoRA attaches."""

from __future__ import annotations

from torch import nn

from minipeft.adapter import AdapterModule, Method, base_modules
from minipeft.copies import TrainedModule
from minipeft.lora.config import LoraConfig
from minipeft.lora.conv import LoraConv, is_convolution
from minipeft.lora.default_targets import usual_targets
from minipeft.lora.experts import LoraParameters, check_target_parameters, find_target_parameters
from minipeft.lora.layer import LoraLayer
from minipeft.lora.layers import LoraConv1D, LoraEmbedding, LoraLinear, LoraNF4Linear
from minipeft.nf4 import NF4Linear
from minipeft.targets import is_conv1d, match_targets, shortest_names


def lora_mixin_for(module: nn.Module) -> type[LoraLayer] | None:
    """The mixin that adapts `module`, or None if LoRA cannot."""
    if isinstance(module, NF4Linear):
        return LoraNF4Linear
    if is_convolution(module):
        return LoraConv
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if is_conv1d(module):
        return LoraConv1D
    # nn.MultiheadAttention reads its out_proj's weight without calling it, and bitsandbytes' layers are nn.Linear
    # with a packed weight: an update on either would be lost or wrong.
    # Llama 4's router is an nn.Linear that returns two things.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or "Router" in type(module).__name__:
        return None
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
    targets = match_targets(model, config, lambda module: lora_mixin_for(module) is not None, skip)
    for path in targets:
        module = model.get_submodule(path)
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        mixin = lora_mixin_for(module)
        if mixin is None:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            if kind.startswith("bitsandbytes."):
                raise ValueError(f"{path!r} is a {kind}: load the model with minipeft's BitsAndBytesConfig instead")
            raise ValueError(
                f"target_modules: {path!r} is a {kind}{_ROUTER if 'Router' in kind else ''}; LoRA adapts "
                "torch.nn.Linear, Embedding, Conv1d, Conv2d and Conv3d, transformers' Conv1D and minipeft's NF4Linear"
            )
        mixin.check(module, path, config)
    if config.target_modules == "all-linear":
        config.target_modules = set(shortest_names(model, targets))
    return targets


LORA = Method(find=_find_targets, mixin_for=_mixin_for)

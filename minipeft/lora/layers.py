"""LoRA on linear layers, plain and packed, and on GPT-2's Conv1D; and the search for the modules that it adapts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapter import AdapterModule, Method, base_modules
from minipeft.copies import TrainedModule
from minipeft.lora.config import LoraConfig, changes_base
from minipeft.lora.default_targets import usual_targets
from minipeft.lora.embedding import LoraEmbedding
from minipeft.lora.experts import LoraParameters, check_target_parameters, find_target_parameters
from minipeft.lora.layer import LoraLayer
from minipeft.lora.variants import wide
from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft.nf4.dense import DenseLinear
from minipeft.targets import is_conv1d, match_targets, shortest_names
from minipeft_kernels.linear.op import linear
from minipeft_kernels.packed import NF4


class LoraDenseLayer(LoraLayer):
    """LoRA on a linear layer with a dense weight, in whichever order that lies."""

    weight: nn.Parameter

    def frozen_weight(self, x: Tensor) -> Tensor | None:
        weight = self.weight
        frozen = self._is_plain and type(weight) in (nn.Parameter, Tensor) and not weight.requires_grad
        fits = frozen and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        return self._matrix() if fits else None

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `LoraLayer.base_output`; the plain forward with a frozen weight is one operation too."""
        weight = None if self.lora_base or args or kwargs else self.frozen_weight(x)
        return super().base_output(x, *args, **kwargs) if weight is None else linear(x, weight, self.bias)

    def dense_weight(self) -> Tensor:
        return wide(self._matrix().detach())

    def _matrix(self) -> Tensor:
        """The weight as (out_features, in_features), perhaps a transposed view."""
        raise NotImplementedError


class LoraLinear(LoraDenseLayer):
    """LoRA on `nn.Linear`, weight (out_features, in_features)."""

    plain_classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, DenseLinear)

    in_features: int
    out_features: int

    def _matrix(self) -> Tensor:
        return self.weight

    def _install_weight(self, weight: Tensor) -> None:
        self._install("weight", weight.to(self.weight.dtype))

    def _lora_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class LoraNF4Linear(LoraLayer):
    """QLoRA (Dettmers et al. 2023): LoRA on a frozen 4-bit layer.

    A merged weight is no longer one of NF4's values, so while merged the layer holds it dense, in the dtype that
    the weight had before it was quantized, beside the packed codes that `unmerge` goes back to.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("dense_merged",)
    plain_classes: ClassVar[tuple[type[nn.Module], ...]] = (NF4Linear,)

    in_features: int
    out_features: int
    dense_merged: Tensor | None
    packed: Callable[[], NF4]
    dequantize: Callable[[torch.dtype], Tensor]
    nf4_weight: Callable[[], NF4Weight]
    set_weight: Callable[[NF4Weight], None]
    to_dense: Callable[..., nn.Module]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "dense_merged"):
            self.register_buffer("dense_merged", None, persistent=False)

    def frozen_weight(self, x: Tensor) -> NF4 | None:
        return self.packed() if self._is_plain and self._buffers["dense_merged"] is None else None

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `LoraLayer.base_output`; while merged, the product with the dense weight, in x's dtype."""
        merged = self._buffers["dense_merged"]
        if merged is None:
            return super().base_output(x, *args, **kwargs)
        bias = None if self.bias is None else self.bias.to(merged.dtype)
        return F.linear(x.to(merged.dtype), merged, bias).to(x.dtype)

    def unmerge(self) -> None:
        super().unmerge()
        self.dense_merged = None

    def dense_form(self) -> nn.Module | None:
        return None if self.dense_merged is None else self.to_dense(weight=self.dense_merged)

    def requantize(self) -> None:
        if self.dense_merged is not None:
            old, dense = self.nf4_weight(), self.dense_merged
            self.dense_merged = None
            self.set_weight(NF4Weight.quantize(dense, old.blocksize, old.double_quant))

    def dense_weight(self) -> Tensor:
        return self.dequantize(torch.float32)

    def _install_weight(self, weight: Tensor) -> None:
        self.dense_merged = weight.to(self.nf4_weight().dtype)

    def _lora_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class LoraConv1D(LoraDenseLayer):
    """LoRA on GPT-2's `Conv1D`: a linear layer whose weight lies as (in_features, out_features)."""

    def _matrix(self) -> Tensor:
        return self.weight.T

    def _install_weight(self, weight: Tensor) -> None:
        self._install("weight", weight.T.contiguous().to(self.weight.dtype))

    def _lora_shape(self) -> tuple[int, int]:
        in_features, out_features = self.weight.shape
        return out_features, in_features

    def _computes_plainly(self) -> bool:
        behind = self._class_behind()
        return behind is not None and behind.__name__ == "Conv1D" and is_conv1d(self)


def lora_mixin_for(module: nn.Module) -> type[LoraLayer] | None:
    """The mixin that adapts `module`, or None if LoRA cannot."""
    if isinstance(module, NF4Linear):
        return LoraNF4Linear
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
        config.target_modules = usual_targets(model)
    targets = match_targets(model, config, lambda module: lora_mixin_for(module) is not None, skip)
    for path in targets:
        module = model.get_submodule(path)
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        if lora_mixin_for(module) is None:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            if kind.startswith("bitsandbytes."):
                raise ValueError(f"{path!r} is a {kind}: load the model with minipeft's BitsAndBytesConfig instead")
            raise ValueError(
                f"target_modules: {path!r} is a {kind}{_ROUTER if 'Router' in kind else ''}; LoRA adapts "
                "torch.nn.Linear, torch.nn.Embedding, transformers' Conv1D and minipeft's NF4Linear"
            )
        if changes_base(config.init_lora_weights) and isinstance(module, nn.Embedding):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} is for linear layers, {path!r} is not one"
            )
    if config.target_modules == "all-linear":
        config.target_modules = shortest_names(model, targets)
    return targets


LORA = Method(find=_find_targets, mixin_for=_mixin_for)

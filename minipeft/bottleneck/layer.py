"""Bottleneck adapters: y = h + s Up(act(Down(LN?(h)))), a small network after a part of each layer.

Houlsby et al. 2019 (section 2.1) put one after the attention and one after the feed-forward part, Pfeiffer et al.
2021 (section 3) one after the feed-forward part alone; He et al. 2022 (section 3.1) let it read the part's input,
beside the part: y = h + s Up(act(Down(x))). LoRA changes weights and can be merged; this changes the function, and
cannot.

The adapted module is the part itself (`self_attn`, `mlp`), or where a family has no module for it its last layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minipeft.adapter import AdapterModule, Method, PackedLayer
from minipeft.bottleneck.config import BottleneckConfig
from minipeft.bottleneck.places import usual_targets
from minipeft.copies import TrainedModule
from minipeft.targets import is_conv1d, match_targets

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
}


class Bottleneck(nn.Module):
    """One adapter's network, (..., in_features) -> (..., out_features).

    Attributes:
        down, up: The two layers, (size, in_features) and (out_features, size), with biases.
        norm: `nn.LayerNorm` over the input, or None.
        scaling: A number, or the trained one, (1,).
    """

    scaling: float | nn.Parameter

    def __init__(
        self, config: BottleneckConfig, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        size = config.size_for(in_features)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        # skip_init: nn.Linear would draw random numbers that are drawn again, or loaded, right after.
        self.down = nn.utils.skip_init(nn.Linear, in_features, size, **like)
        self.up = nn.utils.skip_init(nn.Linear, size, out_features, **like)
        self.norm = nn.LayerNorm(in_features, **like) if config.layer_norm else None
        self.activation = _ACTIVATIONS[config.non_linearity]
        self.dropout = config.dropout
        if config.scaling == "learned":
            self.scaling = nn.Parameter(torch.ones(1, **like))
        else:
            self.scaling = float(config.scaling)

    @torch.no_grad()
    def initialize(self, kind: str) -> None:
        """Start values: see `BottleneckConfig.init_weights`. Biases are 0 in all of them."""
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)
        if kind == "mam_adapter":
            # He et al. 2022: as LoRA's A and B.
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
            return
        for layer in (self.down, self.up):
            if kind == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            else:
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """scaling * Up(act(Down(LN?(x)))), (..., in_features) -> (..., out_features): Houlsby et al. 2019, section 2.1.

        The product is in autocast's dtype under autocast, else in the wider of x's and the network's.
        """
        # The norm's weight and bias are multiplied into Down and the scaling into Up, rather than into activations,
        # which autograd would keep in the adapter's float32 otherwise.
        weight, bias = self.down.weight, self.down.bias
        if self.norm is not None:
            x = F.layer_norm(x, self.norm.normalized_shape, eps=self.norm.eps)
            bias = bias + weight @ self.norm.bias
            weight = weight * self.norm.weight
        middle = self.activation(_linear(x, weight, bias))
        weight, bias = self.up.weight, self.up.bias
        if not isinstance(self.scaling, float) or self.scaling != 1.0:
            weight, bias = weight * self.scaling, bias * self.scaling
        return F.dropout(_linear(middle, weight, bias), self.dropout, self.training)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b in autocast's dtype, else in the wider of x's and W's. x is kept for the backward as it came."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return _CastLinear.apply(x, weight.to(dtype), bias.to(dtype))


class _CastLinear(torch.autograd.Function):
    """x W^T + b with x cast to W's dtype, in the forward and once more in the backward, instead of kept cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (..., out) -> (rows, out)
        grad_x = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = rows.T @ x.reshape(-1, x.shape[-1]).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


class BottleneckLayer(AdapterModule):
    """A module with a `Bottleneck` after it, or beside it, for each adapter.

    Attributes:
        bottleneck: adapter name -> its network; on disk `<module>.adapter_down.weight` and so on.
        bottleneck_parallel: the adapters whose network reads the module's input.
    """

    name_prefix: ClassVar[str] = "Bottleneck"
    # The network reads the module's output with LoRA's update in it, and LoRA sometimes computes that output without
    # calling the classes behind its own: so this class stands in front, whichever method came first.
    outermost: ClassVar[bool] = True
    _own_attributes: ClassVar[tuple[str, ...]] = ("bottleneck", "bottleneck_parallel")

    bottleneck: nn.ModuleDict
    bottleneck_parallel: set[str]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "bottleneck"):
            self.bottleneck, self.bottleneck_parallel = nn.ModuleDict(), set()

    def add_adapter(self, adapter: str, config: BottleneckConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        """Create the network of `adapter`, in `dtype`; left uninitialized when `init` is false (for loading)."""
        in_features, out_features = _features(self, config.hidden_size)
        device = next(self.parameters()).device
        read = in_features if config.is_parallel else out_features
        network = Bottleneck(config, read, out_features, device, dtype)
        if init:
            network.initialize(config.init_weights)
        self.bottleneck[adapter] = network.train(self.training)
        if config.is_parallel:
            self.bottleneck_parallel.add(adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """y = h + scaling * Up(act(Down(h))), with h the module's output; a parallel adapter reads the input x instead.

        Each adapter that acts adds its network's output in turn; h keeps its dtype.

        Raises TypeError for a module that returns no tensor, and for a parallel adapter without the module's input.
        """
        out = super().forward(*args, **kwargs)
        if self.merged_adapters:
            return out
        # Attention modules give (hidden states, weights, ...).
        hidden, *rest = out if isinstance(out, tuple) else (out,)
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"an adapter cannot stand after {type(self).__name__}, which returns {type(hidden).__name__}"
            )
        for adapter in self.switch.acting:
            if adapter in self.bottleneck:
                read = _input_of(args, kwargs) if adapter in self.bottleneck_parallel else hidden
                hidden = (hidden + self.bottleneck[adapter](read)).to(hidden.dtype)
        return (hidden, *rest) if isinstance(out, tuple) else hidden

    def adapter_names(self) -> set[str]:
        return super().adapter_names() | set(self.bottleneck)

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        if adapter not in self.bottleneck:
            return super().adapter_state(adapter)
        own = {f"adapter_{name}": tensor for name, tensor in self.bottleneck[adapter].named_parameters()}
        return {**super().adapter_state(adapter), **own}

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.bottleneck:
            del self.bottleneck[adapter]
            self.bottleneck_parallel.discard(adapter)


def _input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The input of a module's call: its first argument, which transformers gives some attention modules by name."""
    if not args and "hidden_states" not in kwargs:
        raise TypeError(f"a parallel adapter reads a part's first argument or hidden_states, got {sorted(kwargs)}")
    return args[0] if args else kwargs["hidden_states"]


def _features(module: Any, hidden_size: int | None) -> tuple[int, int]:
    """(in_features, out_features) of `module`: its own if it is one linear layer, else the model's hidden size."""
    if is_conv1d(module):
        in_features, out_features = module.weight.shape
        return in_features, out_features
    if isinstance(module, nn.Linear | PackedLayer):
        return module.in_features, module.out_features
    assert hidden_size is not None
    return hidden_size, hidden_size


def bottleneck_mixin_for(module: nn.Module) -> type[BottleneckLayer] | None:
    """`BottleneckLayer`; None for embeddings, for modules that are never called, and for modules without parameters."""
    # nn.MultiheadAttention reads its out_proj's weight without calling it.
    if isinstance(module, nn.Embedding | nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    # A list of layers has no forward of its own.
    if type(module).forward is nn.Module.forward or next(module.parameters(), None) is None:
        return None
    return BottleneckLayer


def _find_targets(model: nn.Module, config: BottleneckConfig, skip: list[str]) -> list[str]:
    if config.target_modules is None:
        config.target_modules = usual_targets(model, config)
    targets = match_targets(model, config, lambda module: bottleneck_mixin_for(module) is not None, skip)
    model_config: Any = getattr(model, "config", None)
    if config.hidden_size is None and hasattr(model_config, "get_text_config"):
        config.hidden_size = getattr(model_config.get_text_config(), "hidden_size", None)
    for path in targets:
        module = model.get_submodule(path)
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if bottleneck_mixin_for(module) is None:
            raise ValueError(f"target_modules: {path!r} is a {kind}, which no adapter can stand after")
        if config.hidden_size is None and not (isinstance(module, nn.Linear | PackedLayer) or is_conv1d(module)):
            raise ValueError(f"target_modules: {path!r} is a {kind}; give hidden_size, the width of what it returns")
    return targets


BOTTLENECK = Method(find=_find_targets, mixin_for=bottleneck_mixin_for)

"""Bottleneck adapters: y = h + s Up(act(Down(LN?(h)))), a small network after a part of each layer.

Houlsby et al. 2019 (section 2.1) put one after the attention and one after the feed-forward part, Pfeiffer et al.
2021 (section 3) one after the feed-forward part alone; He et al. 2022 (section 3.1) let it read the part's input,
beside the part: y = h + s Up(act(Down(x))). LoRA changes weights and can be merged; this changes the function, and
cannot.

The adapted module is the part itself (`self_attn`, `mlp`), or where a family has no module for it its last layer. An
adapter that reads the sum of a part and its input (`original_ln_before`) stands behind the module that returns this
sum, normalized or not.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minipeft.adapter import AdapterModule, Method, base_modules, become
from minipeft.bottleneck.config import BottleneckConfig
from minipeft.bottleneck.invertible import ACTIVATIONS, Coupling, InThisThread, InverseAtHead, start_as
from minipeft.bottleneck.places import usual_targets
from minipeft.copies import TrainedModule
from minipeft.dispatched import device_of
from minipeft.packed import PackedLayer
from minipeft.targets import ends_with, is_conv1d, match_targets


class Bottleneck(nn.Module):
    """One adapter's network, (..., in_features) -> (..., out_features).

    Attributes:
        down, up: The two layers, (size, in_features) and (out_features, size), with biases.
        norm, norm_after: `nn.LayerNorm` over the input and over the output, or None.
        scaling: A number, or the trained one, (1,), or one for each feature of the output, (out_features,).
    """

    scaling: float | nn.Parameter

    def __init__(
        self,
        config: BottleneckConfig,
        in_features: int,
        out_features: int,
        device: torch.device,
        dtype: torch.dtype,
        layer: int | None = None,
    ) -> None:
        super().__init__()
        size = config.size_for(in_features, layer)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        # skip_init: nn.Linear would draw random numbers that are drawn again, or loaded, right after.
        self.down = nn.utils.skip_init(nn.Linear, in_features, size, **like)
        self.up = nn.utils.skip_init(nn.Linear, size, out_features, **like)
        self.norm = nn.LayerNorm(in_features, **like) if config.layer_norm else None
        self.norm_after = nn.LayerNorm(out_features, **like) if config.ln_after else None
        self.activation = ACTIVATIONS[config.non_linearity]
        self.dropout = config.dropout
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(out_features if config.scaling == "channel" else 1, **like))
        else:
            self.scaling = float(config.scaling)

    @torch.no_grad()
    def initialize(self, kind: str) -> None:
        """Start values: see `BottleneckConfig.init_weights`. Biases are 0 in all of them."""
        if kind == "mam_adapter":
            # He et al. 2022: as LoRA's A and B.
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.bias)
            return
        for layer in (self.down, self.up):
            start_as(kind, layer)

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
            rows = self.scaling if isinstance(self.scaling, float) else self.scaling.unsqueeze(-1)
            weight, bias = weight * rows, bias * self.scaling
        out = F.dropout(_linear(middle, weight, bias), self.dropout, self.training)
        return out if self.norm_after is None else self.norm_after(out)


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


class _Seen(threading.local):
    """The input that a module got in this thread's forward, for an adapter at a later one of the same layer.

    nn.DataParallel runs copies of a model in threads: each must find its own. A copied model has a fresh one.
    """

    x: Tensor | None = None

    def __reduce__(self) -> Any:
        return _Seen, ()


class ReadLayer(AdapterModule):
    """A module whose input another one's networks need: `BottleneckConfig.parallel_reads`, `BottleneckConfig.sum_norm`.

    Attributes:
        bottleneck_seen: shared with that other module.
        bottleneck_readers: the adapters of these networks.
    """

    name_prefix: ClassVar[str] = "Read"
    outermost: ClassVar[bool] = True
    _own_attributes: ClassVar[tuple[str, ...]] = ("bottleneck_seen", "bottleneck_readers")

    bottleneck_seen: _Seen
    bottleneck_readers: set[str]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "bottleneck_readers"):
            self.bottleneck_seen, self.bottleneck_readers = _Seen(), set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain module's; the input is kept for the adapters that act."""
        rows = self.switch.rows
        acting = self.switch.acting if rows is None else rows.names
        if not self.bottleneck_readers.isdisjoint(acting):
            self.bottleneck_seen.x = _input_of(args, kwargs)
        return super().forward(*args, **kwargs)

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self.bottleneck_readers.discard(adapter)


@dataclasses.dataclass
class _Place:
    """The place of an adapter's network at a module.

    Attributes:
        kind: "after" (it reads the module's output), "parallel" (an input, the module's own unless `reads` names
            another one), "sum" and "post_add" (the output, which is a normalized sum: see
            `BottleneckConfig.original_ln_before`), "invertible" (it replaces the output).
        reads: Dotted name of the module whose input the adapter needs.
        norm: Name, from this module on, of the norm that ends it.
        seen: What the module `reads` got.
        here: Where a replica's embeddings note an invertible network for its head.
    """

    kind: str
    reads: str | None = None
    norm: str | None = None
    seen: _Seen | None = None
    here: InThisThread | None = None


class BottleneckLayer(AdapterModule):
    """A module with a `Bottleneck` after it or beside it for each adapter.

    Attributes:
        bottleneck: adapter name -> its network; on disk `<module>.adapter_down.weight` and so on.
        bottleneck_place: adapter name -> where its network stands.
    """

    name_prefix: ClassVar[str] = "Bottleneck"
    # The network reads the module's output with LoRA's update in it, and LoRA sometimes computes that output without
    # calling the classes behind its own: so this class stands in front, whichever method came first.
    outermost: ClassVar[bool] = True
    _own_attributes: ClassVar[tuple[str, ...]] = ("bottleneck", "bottleneck_place")

    bottleneck: nn.ModuleDict
    bottleneck_place: dict[str, _Place]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "bottleneck"):
            self.bottleneck, self.bottleneck_place = nn.ModuleDict(), {}

    def add_adapter(self, adapter: str, config: BottleneckConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        """Create the network of `adapter`, in `dtype`; left uninitialized when `init` is false (for loading)."""
        device = device_of(self)
        place = _place_of(config, path)
        network: Bottleneck | Coupling
        if place.kind == "invertible":
            assert config.hidden_size is not None
            network = Coupling(config, config.hidden_size, device, dtype)
        else:
            in_features, out_features = _features(self, config.width_of(path))
            read = in_features if place.kind == "parallel" and place.reads is None else out_features
            network = Bottleneck(config, read, out_features, device, dtype, config.layer_of(path))
        if init:
            network.initialize(config.init_weights)
        self.bottleneck[adapter] = network.train(self.training)
        self.bottleneck_place[adapter] = place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """y = h + scaling * Up(act(Down(h))), with h the module's output; elsewhere as `bottleneck_place` says.

        Each adapter that acts adds its network's output in turn; h keeps its dtype. With `adapter_names` each row goes
        through the network of its own adapter.

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
        if (rows := self.switch.rows) is not None:
            groups = [group for group in rows.groups(len(hidden), hidden.device) if group[0] in self.bottleneck]
            # All inputs first: a norm that is called again for some rows would leave theirs alone.
            reads = [self._read_by(adapter, args, kwargs) for adapter, _ in groups]
            before = hidden
            for (adapter, index), read in zip(groups, reads, strict=True):
                own = self._step(adapter, None if read is None else read[index], before[index])
                hidden = hidden.index_copy(0, index, own)
        for adapter in self.switch.acting:
            if adapter in self.bottleneck:
                hidden = self._step(adapter, self._read_by(adapter, args, kwargs), hidden)
        for place in self.bottleneck_place.values():
            if place.seen is not None:
                place.seen.x = None
        return (hidden, *rest) if isinstance(out, tuple) else hidden

    def _read_by(self, adapter: str, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The input that the adapter needs beside the output, None if none."""
        place = self.bottleneck_place[adapter]
        if place.seen is not None:
            return place.seen.x
        return _input_of(args, kwargs) if place.kind == "parallel" else None

    def _step(self, adapter: str, read: Tensor | None, hidden: Tensor) -> Tensor:
        """`hidden` as the adapter makes it, in the same dtype."""
        network, place = self.bottleneck[adapter], self.bottleneck_place[adapter]
        if place.kind == "invertible":
            if place.here is not None and getattr(self, "_is_replica", False):
                place.here.network = network  # type: ignore[assignment]
            return network(hidden).to(hidden.dtype)
        if place.kind == "after":
            return (hidden + network(hidden)).to(hidden.dtype)
        assert read is not None
        if place.kind == "parallel":
            # A mixture of experts may give its tokens in one row (Llama 4).
            return (hidden + network(read).reshape(hidden.shape)).to(hidden.dtype)
        out = (read + network(hidden)).to(read.dtype)
        if place.kind == "post_add":
            return out
        assert place.norm is not None
        # The norm notes this new sum, for the next adapter.
        return self.get_submodule(place.norm)(out)

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
            del self.bottleneck_place[adapter]


def _input_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The input of a module's call: its first argument, which transformers gives some attention modules by name."""
    if not args and "hidden_states" not in kwargs:
        raise TypeError(f"a parallel adapter reads a part's first argument or hidden_states, got {sorted(kwargs)}")
    return args[0] if args else kwargs["hidden_states"]


def _place_of(config: BottleneckConfig, path: str) -> _Place:
    """The place of the network of an adapter at the module `path`."""
    if config.inv_adapter is not None and path == config.inv_target:
        return _Place("invertible")
    if config.is_parallel:
        reads = config.parallel_reads or {}
        target = max((name for name in reads if ends_with(path, name)), key=len, default=None)
        return _Place("parallel", reads=None if target is None else path.removesuffix(target) + reads[target])
    if config.sum_norm is None or config.residual_before_ln is False:
        return _Place("after")
    kind = "sum" if config.residual_before_ln is True else "post_add"
    return _Place(kind, reads=f"{path}.{config.sum_norm}", norm=config.sum_norm)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _features(module: Any, width: int | None) -> tuple[int, int]:
    """(in_features, out_features) of `module`: its own if it is one linear layer, else `width`."""
    if is_conv1d(module):
        in_features, out_features = module.weight.shape
        return in_features, out_features
    if isinstance(module, nn.Linear | PackedLayer):
        return module.in_features, module.out_features
    assert width is not None
    return width, width


def _width(modules: dict[str, nn.Module], path: str) -> int | None:
    """The width of what the module `path` returns: that of a norm in its layer; None where there is none.

    A model may have towers of several widths, whose modules have the same names.
    """
    numbered = re.match(r"(?:.*\.)?\d+(?=\.|$)", path)
    if numbered is None:
        return None
    layer = numbered.group()
    norms = {name: m for name, m in modules.items() if name.startswith(f"{layer}.") and _is_norm(m)}
    # A norm of queries or keys, as wide as a head, lies deeper than that of the layer.
    for name in sorted(norms, key=lambda name: name.count(".")):
        weight = getattr(norms[name], "weight", None)
        if isinstance(weight, Tensor):
            return weight.shape[-1]
    return None


def _can_stand_after(module: nn.Module) -> bool:
    """False for embeddings, for modules that are never called, and for modules without parameters."""
    # nn.MultiheadAttention reads its out_proj's weight without calling it.
    if isinstance(module, nn.Embedding | nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    # A list of layers has no forward of its own.
    return type(module).forward is not nn.Module.forward and next(module.parameters(), None) is not None


def _find_targets(model: nn.Module, config: BottleneckConfig, skip: list[str]) -> list[str]:
    modules: dict[str, nn.Module] = dict(base_modules(model))
    if config.target_modules is None:
        config.target_modules = usual_targets(model, config)
    targets = match_targets(model, config, _can_stand_after, skip)
    _fill_in(model, config)
    if config.leave_out:
        targets = _without_left_out(config, targets)
    for path in targets:
        module = modules[path]
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if not _can_stand_after(module):
            raise ValueError(f"target_modules: {path!r} is a {kind}, which no adapter can stand after")
        config.widths[path] = _width(modules, path) or config.hidden_size
        if config.widths[path] is None and not (isinstance(module, nn.Linear | PackedLayer) or is_conv1d(module)):
            raise ValueError(f"target_modules: {path!r} is a {kind}; give hidden_size, the width of what it returns")
        read = _place_of(config, path).reads
        if read is not None and read not in modules:
            field = "parallel_reads" if config.is_parallel else "sum_norm"
            raise ValueError(f"{field}: there is no module {read!r}, for the target {path!r}")
        config.size_for(1, config.layer_of(path))
    return targets if config.inv_adapter is None else [_embeddings_of(model, modules, config), *targets]


def _fill_in(model: nn.Module, config: BottleneckConfig) -> None:
    model_config: Any = getattr(model, "config", None)
    if config.hidden_size is None and hasattr(model_config, "get_text_config"):
        config.hidden_size = getattr(model_config.get_text_config(), "hidden_size", None)
    if getattr(model_config, "is_encoder_decoder", False):
        names = [path.split(".") for path, _ in base_modules(model)]
        numbers = [int(part) for parts in names if "encoder" in parts for part in parts if part.isdigit()]
        config.encoder_layers = max(numbers, default=-1) + 1


def _without_left_out(config: BottleneckConfig, targets: list[str]) -> list[str]:
    layers = {config.layer_of(path) for path in targets}
    unknown = sorted(set(config.leave_out) - layers)
    if unknown:
        known = sorted(layer for layer in layers if layer is not None)
        raise ValueError(f"leave_out: there is no adapter in layer {unknown[0]}; there are in {known}")
    left = [path for path in targets if config.layer_of(path) not in config.leave_out]
    if not left:
        raise ValueError(f"leave_out={config.leave_out} leaves no adapter")
    return left


def _embeddings_of(model: Any, modules: dict[str, nn.Module], config: BottleneckConfig) -> str:
    """The module that gives the embedded input: the embedding, or the module around it that adds positions."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        raise ValueError("inv_adapter is for models with input embeddings of tokens, which this one lacks") from None
    path = next(name for name, module in modules.items() if module is embedding)
    around = path.rpartition(".")[0]
    if around.endswith("embeddings") and modules[around] is not model:
        path = around
    if config.hidden_size is None:
        raise ValueError("inv_adapter needs hidden_size, the width of the embeddings")
    config.inv_target = path
    return path


def _connect(model: Any, adapter: str, targets: list[str]) -> None:
    """Let the modules that an adapter reads from, and the output embeddings, know of it."""
    for path in targets:
        module: Any = model.get_submodule(path)
        place = module.bottleneck_place[adapter]
        if place.reads is not None:
            read: Any = model.get_submodule(place.reads)
            become(read, ReadLayer, module.switch)
            read.bottleneck_readers.add(adapter)
            place.seen = read.bottleneck_seen
        elif place.kind == "invertible":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            if head is not None:
                become(head, InverseAtHead, module.switch)
                place.here = InThisThread()
                head.bottleneck_inverses[adapter] = (module.bottleneck[adapter], place.here)


BOTTLENECK = Method(find=_find_targets, mixin_for=lambda module: BottleneckLayer, connect=_connect)

"""Invertible adapters: a network with an exact inverse, behind the input embeddings and in front of the output ones.

Pfeiffer et al. 2020 (MAD-X, section 3.2) let it adapt the embeddings to a language: what it does to them at the input
is undone before the output embeddings, which in their models are the same weights. Its form is NICE's additive
coupling (Dinh et al. 2015, section 3.2): each half of the features gets a function of the other half added, and the
inverse subtracts the same functions in the other order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapter import AdapterModule

if TYPE_CHECKING:
    from minipeft.bottleneck.config import BottleneckConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leakyrelu": F.leaky_relu,
}


@torch.no_grad()
def start_as(kind: str, layer: nn.Linear) -> None:
    """Draw the start of a layer near zero: see `BottleneckConfig.init_weights`. The bias is 0."""
    nn.init.zeros_(layer.bias)
    if kind == "houlsby":
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
    else:
        nn.init.normal_(layer.weight, std=0.02)


class Coupling(nn.Module):
    """y1 = x1 + F(x2), y2 = x2 + G(y1) for the halves x1, x2 of the features, (..., width) -> (..., width).

    Attributes:
        inv_f, inv_g: F and G, two layers each, `inv_adapter_reduction_factor` narrower between them.
    """

    def __init__(self, config: BottleneckConfig, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        first = width // 2
        self.halves = (first, width - first)
        self.inv_f = _TwoLayers(config, width - first, first, device, dtype)
        self.inv_g = _TwoLayers(config, first, width - first, device, dtype)

    def initialize(self, kind: str) -> None:
        """Start values: see `BottleneckConfig.init_weights`; with "mam_adapter" the start is the identity."""
        for network in (self.inv_f, self.inv_g):
            start_as(kind, network.down)
            start_as(kind, network.up)
            if kind == "mam_adapter":
                nn.init.zeros_(network.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted features, in the wider dtype of x's and the network's."""
        x1, x2 = self._halves_of(x)
        y1 = x1 + self.inv_f(x2)
        return torch.cat((y1, x2 + self.inv_g(y1)), dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        """The features that `forward` makes `y` of."""
        y1, y2 = self._halves_of(y)
        x2 = y2 - self.inv_g(y1)
        return torch.cat((y1 - self.inv_f(x2), x2), dim=-1)

    def _halves_of(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.to(torch.promote_types(x.dtype, self.inv_f.down.weight.dtype)).split(self.halves, dim=-1)


class _TwoLayers(nn.Module):
    """Up(act(Down(x))), (..., in_features) -> (..., out_features)."""

    def __init__(
        self, config: BottleneckConfig, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        size = max(1, int(in_features / (config.inv_adapter_reduction_factor or 2)))
        self.down = nn.utils.skip_init(nn.Linear, in_features, size, device=device, dtype=dtype)
        self.up = nn.utils.skip_init(nn.Linear, size, out_features, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[config.non_linearity]

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(x)))


class InThisThread(threading.local):
    """The network of the replica whose embeddings were called last in this thread, for the same replica's head.

    nn.DataParallel runs replicas of a model in threads. A copied model has a fresh one.
    """

    network: Coupling | None = None

    def __reduce__(self) -> Any:
        return InThisThread, ()


class InverseAtHead(AdapterModule):
    """Output embeddings that get the inverse of what the invertible adapters made of the input embeddings.

    Attributes:
        bottleneck_inverses: adapter name -> its `Coupling`, which is a child of the input embeddings alone, and where
            those of a replica note theirs.
    """

    name_prefix: ClassVar[str] = "Inverse"
    outermost: ClassVar[bool] = True
    _own_attributes: ClassVar[tuple[str, ...]] = ("bottleneck_inverses",)

    bottleneck_inverses: dict[str, tuple[Coupling, InThisThread]]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "bottleneck_inverses"):
            self.bottleneck_inverses = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The plain module's output for the inverse of x, (..., width)."""
        for adapter in reversed(self.switch.acting):
            if adapter in self.bottleneck_inverses:
                x = self._network(adapter).inverse(x).to(x.dtype)
        if (rows := self.switch.rows) is not None:
            for adapter, index in rows.groups(len(x), x.device):
                if adapter in self.bottleneck_inverses:
                    own = self._network(adapter).inverse(x[index])
                    x = x.index_copy(0, index, own.to(x.dtype))
        return super().forward(x, *args, **kwargs)

    def _network(self, adapter: str) -> Coupling:
        network, here = self.bottleneck_inverses[adapter]
        if getattr(self, "_is_replica", False) and here.network is not None:
            return here.network
        return network

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self.bottleneck_inverses.pop(adapter, None)

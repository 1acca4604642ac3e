"""LoRA on `nn.MultiheadAttention`, on the in-projection and the out-projection at once, as in PEFT.

The module holds its in-projection as a parameter, and reads its out-projection's weight without calling that layer;
`nn.TransformerEncoderLayer` in inference calls neither, but hands both weights to one fused operation. So an update
beside the product could be passed by. Here whoever reads one of the two weights is given W + s B A while adapters act,
as `bias` is read in `copies.py`; the parameters keep W.

PEFT 0.21.2 adds the out-projection's update twice, in the forward and in merging alike. An adapter that it trained acts
in that way, and so it does here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.adapter import become
from minipeft.copies import is_handled
from minipeft.errors import PeftWarning
from minipeft.lora.calls import Sizes
from minipeft.lora.config import LoraConfig
from minipeft.lora.layer import LoraLayer
from minipeft.lora.layers import LoraLinear
from minipeft.lora.variants import wide


def read_with_updates(name: str) -> Any:
    """The attribute `name` of a `ReadLayer`. What is set or deleted is the base weight, as in a plain module."""

    def read(layer: Any) -> Tensor | None:
        """The weight that acts now: W, with the updates of the adapters that act; W alone for FSDP's bookkeeping."""
        held = vars(layer) if name in vars(layer) else layer._parameters
        if name not in held:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")
        return held[name] if held[name] is None or is_handled(layer, held[name]) else layer.updated(held[name])

    def write(layer: Any, value: Tensor | None) -> None:
        vars(layer)[name] = value

    def delete(layer: Any) -> None:
        del vars(layer)[name]

    return property(read, write, delete)


class ReadLayer(LoraLayer):
    """A layer whose weight others read without calling it."""

    # The number of times that an update counts.
    times: ClassVar[int] = 1

    def updated(self, weight: Tensor) -> Tensor:
        """W + s B A of the adapters that act, in the dtype of `weight`, which is W (out_features, in_features).

        Raises TypeError if rows of a batch are to go through adapters of their own: the weight is one for all.
        """
        rows = self.switch.rows
        if rows is not None and any(self.adapts(adapter) for adapter in rows.names):
            raise TypeError("lora.MultiheadAttention does not support mixed adapter batches (adapter_names)")
        acting = self.acting()
        return self._with_updates(weight, acting).to(weight.dtype) if acting else weight

    @torch.no_grad()
    def merged_weight(self, adapters: tuple[str, ...]) -> Tensor:
        here = [adapter for adapter in adapters if self.adapts(adapter)]
        return self._with_updates(self.base_weight(), here)

    def _with_updates(self, weight: Tensor, adapters: list[str]) -> Tensor:
        weight = wide(weight)
        for adapter in adapters:
            weight = weight + self.times * self.low_rank_matrix(adapter)
        return weight

    def dense_weight(self) -> Tensor:
        return wide(self.base_weight().detach())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, which reads the updated weight."""
        return super(LoraLayer, self).forward(*args, **kwargs)


class LoraOutProjection(ReadLayer, LoraLinear):
    """The out-projection. Its adapters are added, stored and loaded with the module that it is a part of."""

    is_part: ClassVar[bool] = True
    times: ClassVar[int] = 2

    weight = read_with_updates("weight")

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        return {}


class LoraNeverCalled(LoraLinear):
    """The out-projection where it is a target by itself: its attention reads its weight and does not call it.

    PEFT's files hold factors for it, since other layers have the same name (SigLIP's). They never act, as in PEFT, and
    are not merged.
    """

    peft_name: ClassVar[str] = "lora.Linear"

    def hold_factors(self, adapter: str, dtype: torch.dtype, init: bool, config: LoraConfig, path: str) -> None:
        """Create the tensors of `adapter`."""
        LoraLinear.add_adapter(self, adapter, config, path, dtype, init)

    def merged_weight(self, adapters: tuple[str, ...]) -> Tensor:
        return self.dense_weight()

    def merged_bias(self, adapters: tuple[str, ...]) -> Tensor | None:
        return None


class LoraMultiheadAttention(Sizes, ReadLayer):
    """LoRA on `nn.MultiheadAttention`: its in-projection (3 embed_dim, embed_dim), and the out-projection with it."""

    weight_name: ClassVar[str] = "in_proj_weight"

    embed_dim: int
    out_proj: Any
    in_proj_weight = read_with_updates("in_proj_weight")

    @classmethod
    def check(cls, module: Any, path: str, config: LoraConfig) -> None:
        if not module._qkv_same_embed_dim:
            raise ValueError(
                f"Only same embed for query/key/value is supported as of now for MultiheadAttention: {path!r} has kdim "
                f"{module.kdim} and vdim {module.vdim}, embed_dim {module.embed_dim}"
            )
        if not isinstance(module.out_proj, nn.Linear):
            raise TypeError(f"out_proj must be an instance of nn.Linear for MultiheadAttention, {path!r} has another")
        if config.use_dora:
            raise ValueError("MultiheadAttention does not support DoRA (yet), please set use_dora to False")
        if config.lora_bias:
            raise ValueError(f"lora_bias=True is not supported for MultiheadAttention: {path!r} is one")
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} is for linear layers, {path!r} is not one"
            )

    def add_adapter(self, adapter: str, config: LoraConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        """As `LoraLayer.add_adapter`, also for the out-projection."""
        if config.lora_dropout:
            message = "lora_dropout does not act on nn.MultiheadAttention, whose weights are updated as a whole"
            warnings.warn(f"{message} ({path})", PeftWarning, stacklevel=2)
        super().add_adapter(adapter, config, path, dtype, init)
        become(self.out_proj, LoraOutProjection, self.switch)
        LoraOutProjection.add_adapter(self.out_proj, adapter, config, path, dtype, init)

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        state = super().adapter_state(adapter)
        if not self.adapts(adapter):
            return state
        # PEFT wraps both, and this is what the wrapping leaves in its files.
        inner = LoraLayer.adapter_state(self.out_proj, adapter)
        return {**state, **{f"base_layer.out_proj.{name}": tensor for name, tensor in inner.items()}}

    # PEFT's calls on this module are for both projections.

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """As `LayerCalls.merge`, of both projections."""
        super().merge(safe_merge, adapter_names)
        self.out_proj.merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        super().unmerge()
        self.out_proj.unmerge()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """As `LayerCalls.set_adapter`, of both projections."""
        super().set_adapter(adapter_names, inference_mode)
        self.out_proj.set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """As `LayerCalls.enable_adapters`, of both projections."""
        super().enable_adapters(enabled)
        self.out_proj.enable_adapters(enabled)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _lora_shape(self) -> tuple[int, int]:
        return 3 * self.embed_dim, self.embed_dim

"""The layers that LoRA adapts: linear ones, plain and packed, GPT-2's Conv1D and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.dispatched import put
from minipeft.lora.calls import Sizes
from minipeft.lora.config import LoraConfig, changes_base
from minipeft.lora.layer import LoraLayer
from minipeft.lora.variants import wide
from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft.nf4.dense import DenseLinear
from minipeft.targets import is_conv1d
from minipeft_kernels.packed import NF4


class LoraDenseLayer(LoraLayer):
    """LoRA on a linear layer with a dense weight, in whichever order that lies."""

    weight: nn.Parameter

    def frozen_weight(self, x: Tensor) -> Tensor | None:
        weight = self._matrix()
        frozen = self._is_plain and type(weight) in (nn.Parameter, Tensor) and not weight.requires_grad
        return weight if frozen and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)) else None

    def dense_weight(self) -> Tensor:
        return wide(self._matrix().detach())

    def _matrix(self) -> Tensor:
        """The weight as (out_features, in_features), perhaps a transposed view."""
        return self.weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _lora_shape(self) -> tuple[int, int]:
        out_features, in_features = self._matrix().shape
        return out_features, in_features


class LoraLinear(LoraDenseLayer):
    """LoRA on `nn.Linear`, weight (out_features, in_features)."""

    plain_classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, DenseLinear)

    in_features: int
    out_features: int

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
            self._hold_dense(None)

    def _hold_dense(self, merged: Tensor | None) -> None:
        # accelerate moves whatever is called a buffer outside of the state, and None is not.
        self.register_buffer("dense_merged", merged, persistent=merged is None)

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
        self._hold_dense(None)

    def dense_form(self) -> nn.Module | None:
        return None if self.dense_merged is None else self.to_dense(weight=self.dense_merged)

    def requantize(self) -> None:
        if self.dense_merged is not None:
            old, dense = self.nf4_weight(), self.dense_merged
            self._hold_dense(None)
            self.set_weight(NF4Weight.quantize(dense, old.blocksize, old.double_quant))
            put(self, "weight", self.get_parameter("weight"))

    def dense_weight(self) -> Tensor:
        return self.dequantize(torch.float32)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _install_weight(self, weight: Tensor) -> None:
        self._hold_dense(weight.to(self.nf4_weight().dtype))

    def _lora_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class LoraConv1D(Sizes, LoraDenseLayer):
    """LoRA on GPT-2's `Conv1D`: a linear layer whose weight lies as (in_features, out_features)."""

    peft_name: ClassVar[str] = "lora.Linear"

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _matrix(self) -> Tensor:
        return self.weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _lora_shape(self) -> tuple[int, int]:
        in_features, out_features = self.weight.shape
        return out_features, in_features

    def _computes_plainly(self) -> bool:
        behind = self._class_behind()
        return behind is not None and behind.__name__ == "Conv1D" and is_conv1d(self)


class LoraEmbedding(Sizes, LoraLayer):
    """LoRA on `nn.Embedding`: the table is W^T, one input feature a token, and A's columns are looked up.

    The factors are parameters, `lora_embedding_A` (r, num_embeddings) and `lora_embedding_B` (embedding_dim, r).
    A starts at zero and B random, so that the start is the identity.
    """

    # Not the property that reads a layer's.
    bias: Any = None

    weight: nn.Parameter
    padding_idx: int | None

    @classmethod
    def check(cls, module: nn.Module, path: str, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias=True is not supported for Embedding: {path!r} is one")
        if changes_base(config.init_lora_weights):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} is for linear layers, {path!r} is not one"
            )

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """s B A[:, x]: token ids (...) -> (..., embedding_dim)."""
        lora_A, lora_B = self.factors(adapter)
        # Padding gets no gradient, as in the table itself.
        looked_up = F.embedding(x, lora_A.T, self.padding_idx)  # (..., r)
        # Gemma's embeddings multiply the vectors that they look up.
        return looked_up @ lora_B.T * (self.scaling[adapter] * getattr(self, "embed_scale", 1.0))

    def dense_weight(self) -> Tensor:
        return wide(self.weight.detach().T)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def _lora_shape(self) -> tuple[int, int]:
        vocabulary, hidden = self.weight.shape
        return hidden, vocabulary

    def _create_factors(self, adapter: str, r: int, dtype: torch.dtype) -> None:
        hidden, vocabulary = self._lora_shape()
        like: dict[str, Any] = {"device": self._weight_device(), "dtype": dtype}
        for name, shape in (("lora_embedding_A", (r, vocabulary)), ("lora_embedding_B", (hidden, r))):
            self._container(name, nn.ParameterDict)[adapter] = nn.Parameter(torch.empty(shape, **like))

    def _init_factors(self, adapter: str, kind: bool | str) -> None:
        lora_A, lora_B = self.factors(adapter)
        # In PEFT's order of draws, so that a seed gives the same adapter.
        nn.init.normal_(lora_A)
        nn.init.normal_(lora_B)
        if kind is not False:
            nn.init.zeros_(lora_A)
            nn.init.normal_(lora_B)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def _factor_state(self, adapter: str) -> dict[str, Tensor]:
        lora_A, lora_B = self.factors(adapter)
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}

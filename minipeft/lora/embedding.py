"""LoRA on embeddings, with PEFT's names for the factors."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.lora.layer import LoraLayer
from minipeft.lora.variants import wide


class LoraEmbedding(LoraLayer):
    """LoRA on `nn.Embedding`: the table is W^T, one input feature a token, and A's columns are looked up.

    The factors are parameters, `lora_embedding_A` (r, num_embeddings) and `lora_embedding_B` (embedding_dim, r).
    A starts at zero and B random, so that the start is the identity.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("lora_embedding_A", "lora_embedding_B")

    weight: nn.Parameter
    padding_idx: int | None
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if hasattr(self, "lora_embedding_A"):
            return
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """s B A[:, x]: token ids (...) -> (..., embedding_dim)."""
        lora_A, lora_B = self.factors(adapter)
        # Padding gets no gradient, as in the table itself.
        looked_up = F.embedding(x, lora_A.T, self.padding_idx)  # (..., r)
        # Gemma's embeddings multiply the vectors that they look up.
        return looked_up @ lora_B.T * (self.scaling[adapter] * getattr(self, "embed_scale", 1.0))

    def delete_adapter(self, adapter: str) -> None:
        for factors in (self.lora_embedding_A, self.lora_embedding_B):
            if adapter in factors:
                del factors[adapter]
        super().delete_adapter(adapter)

    def dense_weight(self) -> Tensor:
        return wide(self.weight.detach().T)

    def _install_weight(self, weight: Tensor) -> None:
        self._install("weight", weight.T.contiguous().to(self.weight.dtype))

    def _lora_shape(self) -> tuple[int, int]:
        vocabulary, hidden = self.weight.shape
        return hidden, vocabulary

    def _create_factors(self, adapter: str, r: int, dtype: torch.dtype) -> None:
        hidden, vocabulary = self._lora_shape()
        like: dict[str, Any] = {"device": self._weight_device(), "dtype": dtype}
        self.lora_embedding_A[adapter] = nn.Parameter(torch.empty(r, vocabulary, **like))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.empty(hidden, r, **like))

    def _init_factors(self, adapter: str, kind: bool | str) -> None:
        lora_A, lora_B = self.factors(adapter)
        nn.init.normal_(lora_B)
        if kind is False:
            nn.init.normal_(lora_A)
        else:
            nn.init.zeros_(lora_A)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def _factor_state(self, adapter: str) -> dict[str, Tensor]:
        lora_A, lora_B = self.factors(adapter)
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}

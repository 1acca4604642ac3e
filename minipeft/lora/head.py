"""LoRA on a model's output head, whose weight others read without calling it: TRL's losses, Liger's.

They are given W + s B A while adapters act, so that the head learns there, too. The layer itself computes as any other
with LoRA, and the parameter keeps W.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapter import Part
from minipeft.dispatched import has_own_forward
from minipeft.lora.attention import read_with_updates
from minipeft.lora.layers import LoraLinear
from minipeft.lora.variants import wide
from minipeft.mixins import plain_class
from minipeft.tokens.layer import TrainedRows


class ReadHead(LoraLinear):
    """An `nn.Linear` with LoRA whose `weight` is the one that acts now, but for `lora_dropout` and `lora_bias`."""

    name_prefix: ClassVar[str] = ""
    peft_name: ClassVar[str] = "lora.Linear"

    weight = read_with_updates("weight")

    def read_updated(self, adapter: str, dtype: torch.dtype, init: bool) -> None:
        """Nothing to add: the tensors of `adapter` are those of the layer."""

    def updated(self, weight: Tensor) -> Tensor:
        """W with the updates of the adapters that act, in the dtype of `weight`, which is W (out, in)."""
        acting = self.acting()
        if not acting:
            return weight
        own = next((adapter for adapter in acting if adapter in self.lora_base), None)
        out = wide(weight) if own is None else self.lora_base[own].dequantize(torch.float32)
        for adapter in acting:
            out = out + self.variants[adapter].delta(self, adapter)
        return out.to(weight.dtype)

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `LoraLayer.base_output`; nn.Linear's own forward would read the updated weight."""
        if any(adapter in self.lora_base for adapter in self.acting()):
            return super().base_output(x, *args, **kwargs)
        return F.linear(x, self._matrix(), self.bias)

    def _matrix(self) -> Tensor:
        weight: Tensor = self.weight_with_rows() if isinstance(self, TrainedRows) else self.base_weight()
        return weight


def head_parts(model: Any, targets: list[str]) -> list[Part]:
    """The part that lets others read the updates of the model's output head, if it is a target and a plain layer."""
    try:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    except NotImplementedError:
        return []
    paths = [path for path in targets if model.get_submodule(path) is head]
    plain = head is not None and plain_class(head) is nn.Linear and not has_own_forward(head)
    return [Part(path, ReadHead, ReadHead.read_updated) for path in paths if plain]

"""The calls that PEFT has on one layer with LoRA: scales, settings by adapter, the update as a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.biases import TrainedBias
from minipeft.copies import without_mixins
from minipeft.lora.variants import Plain


class Sizes:
    """PEFT's names of a layer's sizes, for layers that have others for them."""

    _lora_shape: Callable[[], tuple[int, int]]

    @property
    def in_features(self) -> int:
        """The number of A's input features or channels."""
        return self._lora_shape()[1]

    @property
    def out_features(self) -> int:
        """The number of B's output features or channels."""
        return self._lora_shape()[0]


class LoraCalls(TrainedBias):
    """PEFT's calls on a LoRA layer; the tensors and numbers that they read lie in `AdapterStore`."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    )
    other_param_names: ClassVar[tuple[str, ...]] = (
        *("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias"),
    )

    lora_A: Any
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    variants: dict[str, Plain]
    factors: Callable[[str], tuple[Tensor, Tensor]]
    as_weight: Callable[[Tensor], Tensor]

    @property
    def base_layer(self) -> Any:
        """The layer without its adapters: an object of its plain class over the same tensors (merged ones included).

        It is made when it is asked for and belongs to no module, so nothing is listed twice.
        """
        return without_mixins(self)

    def get_base_layer(self) -> Any:
        """`base_layer`."""
        return self.base_layer

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A, laid out as the layer's weight, in the dtype of the factors.

        For DoRA it is the low-rank part alone, as in PEFT; `delta_weight` is what merging adds.
        """
        matrix = self.variants[adapter].product(self, adapter)  # type: ignore[arg-type]
        return self.as_weight(matrix).to(self.factors(adapter)[0].dtype)

    def _get_name(self) -> str:
        # As PEFT shows its layers: "lora.Linear".
        mixin = next(
            cls for cls in type(self).__mro__ if issubclass(cls, LoraCalls) and "_plain_class" not in vars(cls)
        )
        return mixin.peft_name or f"lora.{mixin.__name__.removeprefix('Lora')}"

    # Conv1D's own says its sizes alone.
    __repr__ = nn.Module.__repr__

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make s the one of the config times `scale`; nothing happens if the layer does not have `adapter`."""
        if adapter in self.scaling:
            r = self.r[adapter]
            self.scaling[adapter] = scale * self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora[adapter] else r)

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the adapters that are set to act here by `scale`; an embedding keeps its own, as in PEFT."""
        for adapter in self.active_adapters:
            if adapter in self.lora_A and scale != 1:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`: divide s by `scale`; None goes back to the config's."""
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            if scale is None:
                self.set_scale(adapter, 1)
            else:
                self.scaling[adapter] /= scale

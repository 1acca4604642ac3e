"""The calls that PEFT has on one layer with LoRA: scales, settings by adapter, the update as a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.biases import TrainedBias
from minipeft.copies import without_mixins
from minipeft.dispatched import in_memory
from minipeft.gathered import gathered
from minipeft.lora.own_forward import merges_alike
from minipeft.lora.variants import Plain
from minipeft.mixins import plain_class
from minipeft.packed import PackedLayer
from minipeft.targets import is_conv1d


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
    use_dora: dict[str, bool]
    variants: dict[str, Plain]
    factors: Callable[[str], tuple[Tensor, Tensor]]
    base_output: Callable[..., Any]
    merged_weight: Callable[[tuple[str, ...]], Tensor]
    lora_base: Any
    _is_plain: bool
    _class_behind: Callable[[], type | None]
    as_weight: Callable[[Tensor], Tensor]

    def unmergeable(self, adapters: tuple[str, ...]) -> str | None:
        """As `AdapterModule.unmergeable`; an own forward that does more with the weight than W x + b is a reason."""
        here = tuple(adapter for adapter in adapters if adapter in self.scaling)
        reason = super().unmergeable(adapters)
        if reason is not None or not here or not self._has_own_forward():
            return reason
        with in_memory(self), gathered(self) as true:
            scaled = any(self.use_dora[adapter] for adapter in here)
            true.append(merges_alike(self, self.base_output, self.merged_weight(here), scaled))
        if true[0]:
            return None
        kind = f"{plain_class(self).__module__}.{plain_class(self).__name__}"
        return f"{kind} does more with its weight than W x + b: merged it would be another function"

    def _has_own_forward(self) -> bool:
        """True for a linear layer or an embedding whose class or instance has a forward of its own."""
        linear = isinstance(self, nn.Linear | nn.Embedding | PackedLayer) or is_conv1d(self)
        behind = self._class_behind()
        known = self._is_plain or behind is None or behind.__module__.startswith("torch.nn.")
        return linear and not known and not self.lora_base

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

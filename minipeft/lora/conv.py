"""LoRA on convolutions: A is a convolution of the layer's own kind to r channels, B one of kernel size 1 to all.

With its kernel and input channels flattened, a weight (out_channels, in_channels / groups, *kernel) is a matrix, and so
are A (r, in_channels * kernel) and B (out_channels, r): B A is the update of the weight, as for a linear layer. So the
formulas of `variants.py` and `combine.py` hold as they are.

In groups it is otherwise, since A, as PEFT has it, reads all input channels and B alone is in groups: the update is a
convolution without groups, which no weight in groups can hold. Such a layer is adapted, and not merged.

A takes stride, padding and, unlike in PEFT, dilation and padding mode of its layer: so what is merged is what acted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.lora.calls import Sizes
from minipeft.lora.config import LoraConfig
from minipeft.lora.layer import LoraLayer
from minipeft.lora.variants import wide

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LoraConv(Sizes, LoraLayer):
    """LoRA on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: (..., in_channels, *sizes) -> (..., out_channels, *sizes)."""

    weight: nn.Parameter
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]

    @classmethod
    def check(cls, module: Any, path: str, config: LoraConfig) -> None:
        r, _, _ = config.settings_for(path)
        if r % module.groups:
            raise ValueError(
                f"Targeting a {type(module).__name__} with groups={module.groups} and rank {r}. Currently, support is "
                "limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
                f"not target this specific layer. It is {path!r}."
            )
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"Unknown initialization init_lora_weights={config.init_lora_weights!r} for a convolution ({path!r}): "
                "it is for linear layers; take True, False or 'gaussian'"
            )

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """s B A dropout(x), in the wider of x's and the factors' dtypes."""
        dropout = self.dropout_of(adapter)
        lora_A, lora_B = self.lora_A[adapter], self.lora_B[adapter]
        dtype = torch.promote_types(x.dtype, lora_A.weight.dtype)
        low = (x if dropout is None else dropout(x)).to(dtype)
        for factor in (lora_A, lora_B):
            low = factor._conv_forward(low, factor.weight.to(dtype), None)
        return low * self.scaling[adapter]

    def per_output(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * len(self.kernel_size))

    def magnitude_shape(self) -> tuple[int, ...]:
        return (1, self.out_channels, *[1] * len(self.kernel_size))

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, in_channels * kernel) and B (out_channels, r); in groups B's rows lie r numbers long, as PEFT's."""
        lora_A, lora_B = self.factors(adapter)
        return lora_A.flatten(1), lora_B.reshape(-1, len(lora_A))

    def low_rank_matrix(self, adapter: str) -> Tensor:
        # In groups this is no change of the weight, but the matrix of whose rows PEFT's DoRA takes the lengths.
        return super().low_rank_matrix(adapter).reshape(self.out_channels, -1)

    def unmergeable(self, adapters: tuple[str, ...]) -> str | None:
        if self.groups > 1 and any(self.adapts(adapter) for adapter in adapters):
            return f"Merging is not supported for convolutions with groups > 1: it has groups={self.groups}"
        return super().unmergeable(adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As `LoraCalls.get_delta_weight`. Raises ValueError for a layer in groups, whose weight no update fits."""
        if self.groups > 1:
            raise ValueError(f"a convolution with groups={self.groups} has no update of its weight's shape")
        return super().get_delta_weight(adapter)

    def dense_weight(self) -> Tensor:
        return wide(self.weight.detach().flatten(1))

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    def _lora_shape(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels

    def _create_factors(self, adapter: str, r: int, dtype: torch.dtype) -> None:
        own: Any = self
        conv = _CONVOLUTIONS[len(self.kernel_size)]
        settings = {name: getattr(own, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        lora_A = conv(self.in_channels, r, self.kernel_size, **settings, bias=False, device="meta")
        lora_B = conv(r, self.out_channels, 1, groups=self.groups, bias=False, device="meta")
        for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
            factor.weight = nn.Parameter(torch.empty(factor.weight.shape, device=self._weight_device(), dtype=dtype))
            self._container(name, nn.ModuleDict)[adapter] = factor


class LoraConv1d(LoraConv):
    """LoRA on `nn.Conv1d`."""


class LoraConv2d(LoraConv):
    """LoRA on `nn.Conv2d`."""


class LoraConv3d(LoraConv):
    """LoRA on `nn.Conv3d`."""


def conv_mixin_for(module: nn.Module) -> type[LoraConv] | None:
    """The mixin for a convolution of one, two or three dimensions, else None.

    Its weight may be computed at every call, as weight_norm and spectral_norm do: then it is adapted, and not merged.
    """
    kinds: dict[Any, type[LoraConv]] = {nn.Conv1d: LoraConv1d, nn.Conv2d: LoraConv2d, nn.Conv3d: LoraConv3d}
    return next((mixin for kind, mixin in kinds.items() if isinstance(module, kind)), None)

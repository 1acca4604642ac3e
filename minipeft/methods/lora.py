"""LoRA: h = W0 x + s B A dropout(x), with W0 frozen (Hu et al. 2021, section 4.1), and two of its variants.

rsLoRA (Kalajdzievski 2023) scales by alpha / sqrt(r) instead of alpha / r. DoRA (Liu et al. 2024) splits the adapted
weight into a direction and a learned length per output feature.

A target is adapted in place: the mixin `LoraLayer` goes in front of its class (see `base.py`), so `q_proj` stays the
module it was, `q_proj.weight` keeps its name, and the adapter lies beside it as `q_proj.lora_A.<adapter>.weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.kernels.lora_matmul import lora_matmul, lora_update
from minipeft.kernels.nf4_matmul import Packed, Sizes
from minipeft.methods.base import Method
from minipeft.methods.loftq import LoftqBase, LoftQConfig, loftq
from minipeft.methods.lora_config import LoraConfig
from minipeft.methods.lora_init import changes_base, init_factors, is_pissa, pissa_start
from minipeft.methods.lora_rows import add_row_updates
from minipeft.methods.matching import is_conv1d, match_targets, shortest_names
from minipeft.methods.trained_copies import TrainedBias, TrainedModule
from minipeft.quantization import NF4Linear, NF4Weight


class LoraLayer(TrainedBias):
    """What the adapted layers share. A subclass says how it applies A and B and how its weight lies.

    Attributes (all keyed by adapter name, as in PEFT):
        lora_A, lora_B: the factors, (r, in_features) and (out_features, r).
        lora_dropout: applied to the update's input.
        lora_magnitude_vector: (out_features,), DoRA's m; only for adapters that use it.
        lora_start: what is subtracted from the base; only for adapters that start as PiSSA (see `lora_init.py`).
        lora_base: what acts in the place of the base weight; only for adapters that start as LoftQ (see `loftq.py`).
        r, lora_alpha, scaling: the numbers.
    """

    name_prefix: ClassVar[str] = "Lora"
    _own_attributes: ClassVar[tuple[str, ...]] = (
        *("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector", "lora_start", "lora_base"),
        *("r", "lora_alpha", "scaling"),
    )

    lora_A: Any
    lora_B: Any
    lora_dropout: nn.ModuleDict
    lora_magnitude_vector: nn.ParameterDict
    lora_start: Any
    lora_base: Any

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if hasattr(self, "scaling"):
            return
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.lora_start, self.lora_base = nn.ModuleDict(), nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}

    def add_adapter(self, adapter: str, config: LoraConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        """Create the tensors of `adapter`, in `dtype`; left uninitialized when `init` is false (for loading)."""
        r, alpha, scaling = config.settings_for(path)
        self.r[adapter], self.lora_alpha[adapter], self.scaling[adapter] = r, alpha, scaling
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter] = dropout.train(self.training)
        self._create_factors(adapter, r, dtype)
        if is_pissa(config.init_lora_weights):
            kind = str(config.init_lora_weights)
            self.lora_start[adapter] = pissa_start(self.dense_weight(), r, scaling, kind, dtype)
        if config.init_lora_weights == "loftq":
            self._quantize_base(adapter, config, init)
        elif init:
            self._init_factors(adapter, config.init_lora_weights)
        if config.use_dora:
            # m starts as the weight's own length, so that the start is the identity (section 4.1 of the paper).
            length = self.adapted_length(adapter) if init else torch.empty(self._lora_shape()[0])
            self.lora_magnitude_vector[adapter] = nn.Parameter(length.to(self._weight_device(), dtype))
        if config.bias != "none" and self._parameters.get("bias") is not None:
            self.train_bias(adapter, dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self._base_output(x, *args, **kwargs)
        if self.merged_adapters:
            self._check_not_by_row()
            return base
        if self.switch.rows is not None:
            return add_row_updates(self, self.switch.rows, x, base)
        out = base
        for adapter in self.switch.acting:
            if adapter in self.scaling:
                out = self.add_update(adapter, x, base, out)
        return out

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        acting = self.switch.acting if self.lora_base and not self.merged_adapters else ()
        own = next((adapter for adapter in acting if adapter in self.lora_base), None)
        if own is None:
            return super().forward(x, *args, **kwargs)
        out: Tensor = self.lora_base[own](x)
        return out if self.bias is None else (out + self.bias).to(out.dtype)

    def _check_not_by_row(self) -> None:
        if self.switch.rows is not None:
            raise ValueError(f"adapter_names needs unmerged weights, but {list(self.merged_adapters)} are merged")

    def add_update(self, adapter: str, x: Tensor, base: Tensor, out: Tensor) -> Tensor:
        """`out` with what `adapter` changes; `base` is the base layer's own output for `x`."""
        update = self.update(adapter, x)
        if adapter not in self.lora_magnitude_vector:
            return (out + update).to(out.dtype)
        # DoRA: W' = m (W + s B A) / |W + s B A|; the length is a constant for the gradient (section 4.3).
        ratio = self.lora_magnitude_vector[adapter] / self.adapted_length(adapter).to(update.dtype)
        unbiased = base if self.bias is None else base - self.bias
        return (out + (ratio - 1) * unbiased + ratio * update).to(out.dtype)

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """s B A dropout(x), minus s B0 A0 x for PiSSA: (..., in_features) -> (..., out_features)."""
        scaling = self.scaling[adapter]
        update = lora_update(self.lora_dropout[adapter](x), *self.factors(adapter), scaling)
        return update - self.lora_start[adapter].update(x, scaling) if adapter in self.lora_start else update

    @torch.no_grad()
    def adapted_length(self, adapter: str) -> Tensor:
        """(out_features,) float32: |W'|, the weight with the update; one Euclidean length per output feature."""
        return (self.dense_weight() + self._product(adapter)).norm(dim=1)

    @torch.no_grad()
    def delta_weight(self, adapter: str) -> Tensor:
        """(out_features, in_features) float32: what merging `adapter` adds to the weight."""
        product = self._product(adapter)
        if adapter not in self.lora_magnitude_vector:
            return product
        weight = self.dense_weight()
        ratio = _wide(self.lora_magnitude_vector[adapter]) / self.adapted_length(adapter)
        return ratio[:, None] * (weight + product) - weight

    def _product(self, adapter: str) -> Tensor:
        lora_A, lora_B = self.factors(adapter)
        product = _wide(lora_B) @ _wide(lora_A)
        if adapter in self.lora_start:
            product = product - self.lora_start[adapter].product()
        return product * self.scaling[adapter]

    def merged_weight(self, adapters: tuple[str, ...]) -> Tensor:
        """(out_features, in_features) float32: the base weight with the updates of `adapters` added."""
        own = next((adapter for adapter in adapters if adapter in self.lora_base), None)
        weight = self.dense_weight().clone() if own is None else self.lora_base[own].dequantize(torch.float32)
        for adapter in adapters:
            if adapter in self.scaling:
                weight += self.delta_weight(adapter)
        return weight

    def merge(self, adapters: tuple[str, ...]) -> None:
        merged = self.merged_weight(adapters)
        super().merge(adapters)
        self._install_weight(merged)

    def adapts(self, adapter: str) -> bool:
        """Whether `adapter` has a low-rank update here (it may have a bias alone)."""
        return adapter in self.scaling

    def adapter_names(self) -> set[str]:
        return set(self.scaling) | super().adapter_names()

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        bias = super().adapter_state(adapter)
        if adapter not in self.scaling:
            return bias
        state = self._factor_state(adapter)
        if adapter in self.lora_magnitude_vector:
            state["lora_magnitude_vector"] = self.lora_magnitude_vector[adapter]
        # PEFT wraps the modules that it adapts, and this name is what the wrapping leaves in its files.
        return {**state, **{f"base_layer.{name}": tensor for name, tensor in bias.items()}}

    def replaced_tensors(self, adapter: str) -> list[str]:
        return [*super().replaced_tensors(adapter), *(["weight"] if adapter in self.lora_base else [])]

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        own = (self.lora_A, self.lora_B, self.lora_dropout, self.lora_magnitude_vector, self.lora_start, self.lora_base)
        for holder in own:
            if adapter in holder:
                del holder[adapter]
        for numbers in (self.r, self.lora_alpha, self.scaling):
            numbers.pop(adapter, None)

    # How one kind of layer differs from another.

    def dense_weight(self) -> Tensor:
        """(out_features, in_features) float32: the base weight."""
        raise NotImplementedError

    def _install_weight(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _lora_shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        raise NotImplementedError

    def _weight_device(self) -> torch.device:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.device

    def _create_factors(self, adapter: str, r: int, dtype: torch.dtype) -> None:
        out_features, in_features = self._lora_shape()
        like = {"bias": False, "device": self._weight_device(), "dtype": dtype}
        # skip_init: nn.Linear would draw random numbers that are drawn again, or loaded, right after.
        self.lora_A[adapter] = nn.utils.skip_init(nn.Linear, in_features, r, **like)
        self.lora_B[adapter] = nn.utils.skip_init(nn.Linear, r, out_features, **like)

    def _init_factors(self, adapter: str, kind: bool | str) -> None:
        lora_A, lora_B = self.factors(adapter)
        if adapter in self.lora_start:
            lora_A.data.copy_(self.lora_start[adapter].lora_A)
            lora_B.data.copy_(self.lora_start[adapter].lora_B)
        else:
            init_factors(lora_A, lora_B, kind)

    def _quantize_base(self, adapter: str, config: LoraConfig, init: bool) -> None:
        """Give `adapter` the quantized weight of LoftQ, and with `init` the factors that go with it."""
        rounds = LoftQConfig(**config.loftq_config).loftq_iter
        packed, *new = loftq(self.dense_weight().float(), self.r[adapter], self.scaling[adapter], rounds)
        self.lora_base[adapter] = LoftqBase.of(packed, self._weight_device())
        for factor, value in zip(self.factors(adapter), new, strict=True) if init else ():
            factor.data.copy_(value)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The live A (r, in_features) and B (out_features, r) of `adapter`."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def _factor_state(self, adapter: str) -> dict[str, Tensor]:
        lora_A, lora_B = self.factors(adapter)
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


class LoraLinear(LoraLayer):
    """LoRA on `nn.Linear`, weight (out_features, in_features)."""

    weight: nn.Parameter
    in_features: int
    out_features: int

    def dense_weight(self) -> Tensor:
        return _wide(self.weight.detach())

    def _install_weight(self, weight: Tensor) -> None:
        self._install("weight", weight.to(self.weight.dtype))

    def _lora_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class LoraNF4Linear(LoraLayer):
    """QLoRA (Dettmers et al. 2023): LoRA on a frozen 4-bit layer.

    A merged weight is no longer one of NF4's values, so while merged the layer holds it dense, in the dtype that
    the weight had before it was quantized, beside the packed codes that `unmerge` goes back to.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("dense_merged",)

    in_features: int
    out_features: int
    dense_merged: Tensor | None
    compute_dtype: torch.dtype | None
    autocast: Callable[[Tensor], Tensor]
    packed: Callable[[], Packed]
    sizes: Callable[[], Sizes]
    dequantize: Callable[[torch.dtype], Tensor]
    nf4_weight: Callable[[], NF4Weight]
    set_weight: Callable[[NF4Weight], None]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "dense_merged"):
            self.register_buffer("dense_merged", None, persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dense_merged is None:
            adapter = self._fused_adapter()
            return super().forward(x, *args, **kwargs) if adapter is None else self._fused_forward(adapter, x)
        self._check_not_by_row()
        bias = None if self.bias is None else self.bias.to(self.dense_merged.dtype)
        return F.linear(x.to(self.dense_merged.dtype), self.dense_merged, bias).to(x.dtype)

    def _fused_adapter(self) -> str | None:
        """The adapter whose update is made in one operation with the base product: it acts alone, on the same x."""
        acting = [] if self.merged_adapters else [a for a in self.switch.acting if a in self.scaling]
        if len(acting) != 1 or acting[0] in self.lora_magnitude_vector or acting[0] in self.lora_start:
            return None
        dropout = self.lora_dropout[acting[0]]
        return None if isinstance(dropout, nn.Dropout) and dropout.training else acting[0]

    def _fused_forward(self, adapter: str, x: Tensor) -> Tensor:
        factors = (*self.factors(adapter), self.scaling[adapter])
        return lora_matmul(self.autocast(x), self.packed(), *factors, *self.sizes(), self.bias, self.compute_dtype)

    def unmerge(self) -> None:
        super().unmerge()
        self.dense_merged = None

    def _quantize_base(self, adapter: str, config: LoraConfig, init: bool) -> None:
        # An adapter of one round was trained on the plain quantization, which this layer has.
        if init or LoftQConfig(**config.loftq_config).loftq_iter != 1:
            raise ValueError(
                "init_lora_weights='loftq' needs the weights before quantization, and this layer is NF4 already: "
                "attach the adapter to the plain model, or attach an ordinary one and call replace_lora_weights_loftq"
            )

    def dense_weight(self) -> Tensor:
        return self.dequantize(torch.float32)

    def _install_weight(self, weight: Tensor) -> None:
        self.dense_merged = weight.to(self.nf4_weight().dtype)

    def _lora_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


class LoraConv1D(LoraLayer):
    """LoRA on GPT-2's `Conv1D`: a linear layer whose weight lies as (in_features, out_features)."""

    weight: nn.Parameter

    def dense_weight(self) -> Tensor:
        return _wide(self.weight.detach().T)

    def _install_weight(self, weight: Tensor) -> None:
        self._install("weight", weight.T.contiguous().to(self.weight.dtype))

    def _lora_shape(self) -> tuple[int, int]:
        in_features, out_features = self.weight.shape
        return out_features, in_features


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
        lora_A, lora_B = self.factors(adapter)
        # No gradient for padding, as for the table itself.
        looked_up = F.embedding(x, lora_A.T, self.padding_idx)  # (..., r)
        # Gemma's embeddings multiply what they look up.
        return looked_up @ lora_B.T * (self.scaling[adapter] * getattr(self, "embed_scale", 1.0))

    def delete_adapter(self, adapter: str) -> None:
        for factors in (self.lora_embedding_A, self.lora_embedding_B):
            if adapter in factors:
                del factors[adapter]
        super().delete_adapter(adapter)

    def dense_weight(self) -> Tensor:
        return _wide(self.weight.detach().T)

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


def lora_mixin_for(module: nn.Module) -> type[LoraLayer] | None:
    """The mixin that adapts `module`, or None if LoRA cannot."""
    if isinstance(module, NF4Linear):
        return LoraNF4Linear
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    if is_conv1d(module):
        return LoraConv1D
    # nn.MultiheadAttention reads its out_proj's weight without calling it, and bitsandbytes' layers are nn.Linear
    # with a packed weight: an update on either would be lost or wrong.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear) and module.weight.shape == (module.out_features, module.in_features):
        return LoraLinear
    return None


_ROUTER = ", the router of a mixture of experts"


def _find_targets(model: nn.Module, config: LoraConfig, skip: list[str]) -> list[str]:
    targets = match_targets(model, config, lambda module: lora_mixin_for(module) is not None, skip)
    for path in targets:
        module = model.get_submodule(path)
        if isinstance(module, TrainedModule):
            raise ValueError(f"target_modules: {path!r} is another adapter's modules_to_save")
        if lora_mixin_for(module) is None:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            if kind.startswith("bitsandbytes."):
                raise ValueError(f"{path!r} is a {kind}: load the model with minipeft's BitsAndBytesConfig instead")
            raise ValueError(
                f"target_modules: {path!r} is a {kind}{_ROUTER if 'Router' in kind else ''}; LoRA adapts "
                "torch.nn.Linear, torch.nn.Embedding, transformers' Conv1D and minipeft's NF4Linear"
            )
        if changes_base(config.init_lora_weights) and isinstance(module, nn.Embedding):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} is for linear layers, {path!r} is not one"
            )
    if config.target_modules == "all-linear":
        config.target_modules = shortest_names(model, targets)
    return targets


LORA = Method(find=_find_targets, mixin_for=lora_mixin_for)


def _wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Updates that do more than add s B A x: DoRA, PiSSA and LoftQ; and the start values of A and B.

A layer has one variant for each adapter. A variant gives the adapter its start, adds the update to the layer's output
and says what merging adds to the weight; most adapters have `Plain`, which is LoRA itself.

DoRA (Liu et al. 2024) splits the adapted weight into a direction and a learned length m of each output feature:
W' = m (W + s B A) / |W + s B A|.

PiSSA (Meng et al. 2024): with W = U S V^T, the factors start as B0 = U_r sqrt(S_r / s) and A0 = sqrt(S_r / s) V_r^T
(equations 2 and 3), and the frozen weight is the residual W - s B0 A0 (equation 4). PEFT writes the residual into the
base weight, which no other adapter can use then. Here the base weight stays W, and the adapter keeps A0 and B0 to
subtract s B0 A0 by: the same function of A and B, exact in any dtype, at the cost of one more low-rank product. So
disabling, deleting and unloading give the base model back, and a PiSSA adapter acts beside others.

OLoRA (Buyukakyuz 2024) starts in the same way from the weight's QR decomposition: B0 = Q_r, A0 = R_r.

LoftQ (Li et al. 2023) starts an adapter from the error of quantization, on a base quantized to suit it. Algorithm 1 of
the paper, with T = `loftq_iter`: from A = B = 0, in turn Q = quantize(W - s B A), then s B A = the leading r components
of W - Q. The layer acts as Q + s B A, nearer to W than its plain quantization: a start for QLoRA. PEFT writes Q into
the base weight. Here the plain layer keeps W, and the adapter holds Q, packed in NF4, which stands in for W while the
adapter acts: disabling, deleting and unloading give W back.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.dispatched import in_memory
from minipeft.errors import PeftWarning
from minipeft.lora.config import LoftQConfig, LoraConfig, is_pissa
from minipeft.mixins import plain_class
from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft.packed import PackedLayer
from minipeft_kernels.linear.shorthands import lora_update

if TYPE_CHECKING:
    from minipeft.lora.layer import LoraLayer

# More directions than are wanted make the approximate decomposition sharp (Halko et al. 2011, section 4.2: 5 or 10).
_OVERSAMPLING = 8


class Plain:
    """LoRA itself: h = W0 x + b + s B A x. The other variants change parts of it."""

    # True if the update is s B A x alone, so that it can be made in one operation with the base product.
    fuses: bool = True

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig, dtype: torch.dtype, init: bool) -> None:
        """Give `adapter` its start values, and the tensors that the variant has besides A and B.

        Args:
            dtype: Of the adapter's tensors.
            init: False leaves the tensors that will be loaded uninitialized.
        """
        if init:
            layer._init_factors(adapter, config.init_lora_weights)

    def apply(self, layer: LoraLayer, adapter: str, x: Tensor, base: Tensor, out: Tensor) -> Tensor:
        """`out` with the update of `adapter`; `base` is the base layer's own output for `x`. In the dtype of `out`."""
        return (out + self.update(layer, adapter, x)).to(out.dtype)

    def update(self, layer: LoraLayer, adapter: str, x: Tensor) -> Tensor:
        """The change of the output for x: (..., in_features) -> (..., out_features)."""
        return layer.update(adapter, x)

    def product(self, layer: LoraLayer, adapter: str) -> Tensor:
        """(out_features, in_features), in float32 at least: the low-rank matrix."""
        return layer.low_rank_matrix(adapter)

    def delta(self, layer: LoraLayer, adapter: str) -> Tensor:
        """(out_features, in_features), in float32 at least: the change of the weight by merging."""
        return self.product(layer, adapter)

    def bias_delta(self, layer: LoraLayer, adapter: str) -> Tensor | None:
        """(out_features,), in float32 at least: the change of the bias by merging, if there is one."""
        return None

    def state(self, layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
        """The trained tensors besides A and B, by PEFT's names."""
        return {}

    def plain_state(self, layer: LoraLayer, adapter: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the plain LoRA adapter that acts alike, out of those that are stored, by the same names."""
        return state


class WithBias(Plain):
    """LoRA with a bias at B (PEFT's `lora_bias`): h = W0 x + b + s (B A dropout(x) + b_B)."""

    fuses = False

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig, dtype: torch.dtype, init: bool) -> None:
        super().start(layer, adapter, config, dtype, init)
        if layer._parameters.get("bias") is None:
            message = f"the targeted layer of type {plain_class(layer).__name__} has no bias, so it cannot be merged"
            warnings.warn(f"`lora_bias=True` was passed but {message}", PeftWarning, stacklevel=2)
        bias = torch.zeros(layer._lora_shape()[0], device=layer._weight_device(), dtype=dtype)
        if init and config.init_lora_weights is False:
            bound = 1 / math.sqrt(layer.r[adapter])
            nn.init.uniform_(bias, -bound, bound)
        layer.lora_B[adapter].bias = nn.Parameter(bias)

    def update(self, layer: LoraLayer, adapter: str, x: Tensor) -> Tensor:
        return layer.update(adapter, x) + layer.per_output(layer.lora_B[adapter].bias * layer.scaling[adapter])

    def bias_delta(self, layer: LoraLayer, adapter: str) -> Tensor | None:
        return wide(layer.lora_B[adapter].bias) * layer.scaling[adapter]

    def state(self, layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
        return {"lora_B.bias": layer.lora_B[adapter].bias}


class Pissa(Plain):
    """LoRA that starts from the weight's principal components: h = W0 x + b + s (B A - B0 A0) x."""

    fuses = False

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig, dtype: torch.dtype, init: bool) -> None:
        kind = str(config.init_lora_weights)
        with in_memory(layer):
            start = pissa_start(layer.dense_weight(), layer.r[adapter], layer.scaling[adapter], kind, dtype)
        layer._container("lora_start", nn.ModuleDict)[adapter] = start
        for factor, value in zip(layer.factors(adapter), (start.lora_A, start.lora_B), strict=True) if init else ():
            factor.data.copy_(value)

    def update(self, layer: LoraLayer, adapter: str, x: Tensor) -> Tensor:
        # Dropout acts on the trained product alone.
        return layer.update(adapter, x) - layer.lora_start[adapter].update(x, layer.scaling[adapter])

    def product(self, layer: LoraLayer, adapter: str) -> Tensor:
        lora_A, lora_B = layer.factors(adapter)
        return (wide(lora_B) @ wide(lora_A) - layer.lora_start[adapter].product()) * layer.scaling[adapter]

    def plain_state(self, layer: LoraLayer, adapter: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """LoRA of twice the rank: B A - B0 A0 = [B, -B0] [A; A0]."""
        start, lora_A, lora_B = layer.lora_start[adapter], state["lora_A.weight"], state["lora_B.weight"]
        twice_A = torch.cat([lora_A, start.lora_A.to(lora_A)], dim=0)
        twice_B = torch.cat([lora_B, -start.lora_B.to(lora_B)], dim=1)
        return {**state, "lora_A.weight": twice_A, "lora_B.weight": twice_B}


class Loftq(Plain):
    """LoRA on a weight Q of the adapter's own: h = Q x + b + s B A x."""

    fuses = False

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig, dtype: torch.dtype, init: bool) -> None:
        rounds = LoftQConfig(**config.loftq_config).loftq_iter
        if isinstance(layer, PackedLayer):
            # An adapter of one round was trained on the plain quantization, which this layer has: it needs no Q.
            if init or rounds != 1:
                raise ValueError(
                    "init_lora_weights='loftq' needs the weights before quantization, and this layer is NF4 already: "
                    "attach the adapter to the plain model, or attach an ordinary one and call "
                    "replace_lora_weights_loftq"
                )
            self.fuses = True
            return
        with in_memory(layer):
            packed, *new = loftq(layer.dense_weight().float(), layer.r[adapter], layer.scaling[adapter], rounds)
        layer._container("lora_base", nn.ModuleDict)[adapter] = LoftqBase.of(packed, layer._weight_device())
        for factor, value in zip(layer.factors(adapter), new, strict=True) if init else ():
            factor.data.copy_(value)


class Dora(Plain):
    """DoRA over another variant's low-rank matrix D: h = m / |W0 + D| (W0 + D) x + b."""

    fuses = False
    # True inside `contexts.DoraCaching`.
    caching: ClassVar[bool] = False

    def __init__(self, inner: Plain) -> None:
        self.inner = inner

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig, dtype: torch.dtype, init: bool) -> None:
        self.inner.start(layer, adapter, config, dtype, init)
        # m starts as the weight's own length, so that the start is the identity (section 4.1 of the paper).
        with in_memory(layer):
            length = self.length(layer, adapter) if init else torch.empty(layer._lora_shape()[0])
        magnitude = length.to(layer._weight_device(), dtype).view(layer.magnitude_shape())
        layer._container("lora_magnitude_vector", nn.ModuleDict)[adapter] = DoraMagnitude(magnitude)

    def magnitude(self, layer: LoraLayer, adapter: str) -> Tensor:
        """(out_features,): m."""
        magnitude: Tensor = layer.lora_magnitude_vector[adapter].weight
        return magnitude.flatten()

    @torch.no_grad()
    def length(self, layer: LoraLayer, adapter: str) -> Tensor:
        """(out_features,) float32: |W0 + D|, one Euclidean length per output feature."""
        return (layer.dense_weight() + self.product(layer, adapter)).norm(dim=1)

    def apply(self, layer: LoraLayer, adapter: str, x: Tensor, base: Tensor, out: Tensor) -> Tensor:
        update = self.update(layer, adapter, x)
        # The length is a constant for the gradient (section 4.3), for one that is taken forward, too.
        length = self._length_now(layer, adapter).detach()
        ratio = self.magnitude(layer, adapter) / _divisor(length).to(update.dtype)
        ratio = layer.per_output(ratio)
        bias = getattr(layer, "bias", None)
        unbiased = base if bias is None else base - layer.per_output(bias)
        return (out + (ratio - 1) * unbiased + ratio * update).to(out.dtype)

    def _length_now(self, layer: LoraLayer, adapter: str) -> Tensor:
        """`length`; while `caching` and in eval mode, the one of the last call, if nothing was written since."""
        cache = layer.lora_magnitude_vector[adapter]._dora_cache
        if not self.caching or layer.training:
            cache.clear()
            return self.length(layer, adapter)
        tensors = (*layer.factors(adapter), *(p for p in layer._parameters.values() if p is not None))
        key = (layer.scaling[adapter], *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if key not in cache:
            cache.clear()
            cache[key] = self.length(layer, adapter)
        length: Tensor = cache[key]
        return length

    def update(self, layer: LoraLayer, adapter: str, x: Tensor) -> Tensor:
        return self.inner.update(layer, adapter, x)

    def product(self, layer: LoraLayer, adapter: str) -> Tensor:
        return self.inner.product(layer, adapter)

    def delta(self, layer: LoraLayer, adapter: str) -> Tensor:
        with in_memory(layer):
            weight = layer.dense_weight()
            length = self.length(layer, adapter)
        ratio = wide(self.magnitude(layer, adapter)) / _divisor(length)
        return ratio[:, None] * (weight + self.product(layer, adapter)) - weight

    def state(self, layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
        return {"lora_magnitude_vector": layer.lora_magnitude_vector[adapter].weight}

    def plain_state(self, layer: LoraLayer, adapter: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.inner.plain_state(layer, adapter, state)


def _divisor(length: Tensor) -> Tensor:
    """`length` with 1 for 0: a row of zeros (pruned or padded heads have some) has no direction, and stays zero."""
    return length.masked_fill(length == 0, 1)


class DoraMagnitude(nn.Module):
    """DoRA's m, the learned length of each output feature's weight, under PEFT's name `weight`."""

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)
        # What `Dora._length_now` keeps, by what it was computed from.
        self._dora_cache: dict[tuple, Tensor] = {}

    def train(self, mode: bool = True) -> DoraMagnitude:
        """As `nn.Module.train`; what was kept is forgotten."""
        self._dora_cache.clear()
        return super().train(mode)


def variant_for(config: LoraConfig) -> Plain:
    """The variant that `config` asks for."""
    inner = Pissa() if is_pissa(config.init_lora_weights) else Plain()
    inner = Loftq() if config.init_lora_weights == "loftq" else inner
    inner = WithBias() if config.lora_bias else inner
    return Dora(inner) if config.use_dora else inner


@torch.no_grad()
def init_factors(lora_A: Tensor, lora_B: Tensor, kind: bool | str) -> None:
    """A random; B zero, so that the start is the identity, or random too when `kind` is False or "orthogonal".

    A (r, ...) and B (..., r). The numbers are drawn as by PEFT, whose factors are layers of torch, which draw a start
    of their own first, in the default dtype and on the CPU: so a seed gives the same adapter, on any device.
    """
    start_A, start_B = torch.empty(lora_A.shape), torch.empty(lora_B.shape)
    nn.init.kaiming_uniform_(start_A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(start_B, a=math.sqrt(5))
    if kind == "orthogonal":
        start_A, start_B = orthogonal_factors(len(lora_A), lora_A.shape[1], len(lora_B))
    elif kind is not False:
        nn.init.zeros_(start_B)
        if kind == "gaussian":
            nn.init.normal_(start_A, std=1 / len(lora_A))
        else:
            nn.init.kaiming_uniform_(start_A, a=math.sqrt(5))
    lora_A.copy_(start_A)
    lora_B.copy_(start_B)


def orthogonal_factors(r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (r, in_features) and B (out_features, r), both random, with B A = 0: A's columns and B's rows are orthogonal.

    They lie in the spans of two halves of one random orthogonal basis (PEFT's "orthogonal").
    """
    basis = torch.linalg.qr(torch.randn(r, r)).Q
    lora_A = (torch.randn(in_features, r // 2) @ basis[0::2]).T / 10
    lora_B = torch.randn(r // 2, out_features).T @ basis[1::2] / 10
    return lora_A, lora_B


class PissaStart(nn.Module):
    """A0 (r, in_features) and B0 (out_features, r): the factors that a PiSSA adapter started from, frozen.

    They follow from the base weight, so no file holds them: attaching or loading the adapter computes them anew.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)

    def update(self, x: Tensor, scaling: float) -> Tensor:
        """s B0 A0 x: (..., in_features) -> (..., out_features)."""
        return lora_update(x, self.lora_A, self.lora_B, scaling)

    def product(self) -> Tensor:
        """B0 A0 (out_features, in_features), in float32 at least."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.lora_B.to(wide) @ self.lora_A.to(wide)


@torch.no_grad()
def pissa_start(weight: Tensor, r: int, scaling: float, kind: str, dtype: torch.dtype) -> PissaStart:
    """The principal components of `weight` (out_features, in_features) as the factors of an adapter.

    Args:
        kind: "pissa" decomposes the weight exactly; "pissa_niter_N" by N rounds of the randomized method, much faster.
            "olora" takes the first columns of Q and rows of R of its QR decomposition.
        dtype: Of the factors.

    Raises ValueError when the weight has fewer than r components.
    """
    if r > min(weight.shape):
        raise ValueError(f"init_lora_weights={kind!r}: r is {r}, but the weight {tuple(weight.shape)} has no such rank")
    if kind == "olora":
        orthonormal, triangular = torch.linalg.qr(weight)
        return PissaStart(triangular[:r].to(dtype).contiguous(), orthonormal[:, :r].to(dtype).contiguous())
    rounds = re.fullmatch(r"pissa_niter_(\d+)", kind)
    parts = torch.linalg.svd(weight, full_matrices=False) if rounds is None else _randomized(weight, r, int(rounds[1]))
    left, values, right = parts
    root = (values[:r] / scaling).sqrt()
    return PissaStart((root[:, None] * right[:r]).to(dtype), (left[:, :r] * root).to(dtype))


def _randomized(weight: Tensor, r: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of the leading components of `weight` (Halko et al. 2011, algorithms 4.4 and 5.1).

    Always drawn from the same seed: a saved adapter must find the start that it was trained from.
    """
    wanted = min(r + _OVERSAMPLING, *weight.shape)
    noise = torch.randn(weight.shape[1], wanted, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(weight @ noise.to(weight)).Q  # (out_features, wanted)
    for _ in range(rounds):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ left, values, right


class LoftqBase(NF4Linear):
    """Q: the packed weight that acts in the place of a plain layer's. No file holds it: it follows from W."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def of(cls, packed: NF4Weight, device: torch.device) -> LoftqBase:
        """The layer with this weight (out_features, in_features)."""
        out_features, in_features = packed.shape
        kwargs: dict[str, Any] = {"double_quant": False, "dtype": packed.dtype, "device": device}
        base = cls(in_features, out_features, bias=False, **kwargs)
        base.set_weight(packed)
        return base


@torch.no_grad()
def loftq(weight: Tensor, r: int, scaling: float, rounds: int) -> tuple[NF4Weight, Tensor, Tensor]:
    """Q, A (r, in_features) and B (out_features, r) such that Q + s B A is near `weight` (out_features, in_features).

    Those of the best round, so that more rounds are never worse.

    Raises ValueError when the weight has no rank r.
    """
    if r > min(weight.shape):
        raise ValueError(f"init_lora_weights='loftq': r is {r}, but the weight {tuple(weight.shape)} has no such rank")
    low, best, smallest = torch.zeros_like(weight), None, math.inf
    for _ in range(rounds):
        packed = NF4Weight.quantize(weight - low, double_quant=False)
        lost = weight - packed.dequantize(weight.dtype)
        lora_A, lora_B = leading_factors(lost, r, scaling)
        low = scaling * lora_B @ lora_A
        error = (lost - low).norm().item()
        # A round can be worse than the one before it, as a block's scale follows its largest weight.
        if best is None or error < smallest:
            best, smallest = (packed, lora_A, lora_B), error
    assert best is not None
    return best


def leading_factors(matrix: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B such that s B A is the best approximation of rank r to `matrix`, its singular values split evenly."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (values[:r] / scaling).sqrt()
    return root[:, None] * right[:r], left[:, :r] * root


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

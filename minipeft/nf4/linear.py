"""NF4Linear: nn.Linear with a frozen weight in 4-bit NormalFloat (Dettmers et al. 2023, QLoRA).

Forward and the input gradient decode the packed weight when they need it; nothing else of it is kept for backward.
The scales are buffers that no cast touches, and state_dict speaks bitsandbytes' names.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.nf4.dense import make_dense
from minipeft.nf4.stored import StoredNF4, zeros
from minipeft.nf4.weight import NF4Weight
from minipeft_kernels.linear.op import linear
from minipeft_kernels.nf4.checks import WEIGHT_DTYPES, check_blocksize
from minipeft_kernels.packed import NF4

SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "offset")


class NF4Linear(StoredNF4):
    """y = x W^T + b with W frozen in NF4: (..., in_features) -> (..., out_features), in x's dtype.

    Attributes:
        weight: Parameter, uint8 ((out_features * in_features + 1)//2, 1), never trained.
        bias: Parameter (out_features,) or None.
        absmax, quant_map, nested_absmax, nested_quant_map, offset: buffers, as in `NF4Weight`.
    """

    bias: nn.Parameter | None
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate a packed weight of zeros.

        Args:
            in_features, out_features, bias: as nn.Linear.
            compute_dtype: of the product; None for x's. On a CPU without such instructions it is float32.
            blocksize, double_quant: as `NF4Weight.quantize`.
            dtype: that the weight stands for, and of the bias; None for torch's default.
            device: also "meta", to be filled by `load_state_dict(..., assign=True)` or `set_weight`.

        Raises:
            ValueError: the blocksize. TypeError: the compute dtype.
        """
        super().__init__()
        check_blocksize(blocksize)
        if compute_dtype not in (None, *WEIGHT_DTYPES):
            raise TypeError(f"compute_dtype must be float32, bfloat16, float16 or None, got {compute_dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        dtype = dtype or torch.get_default_dtype()
        # Registered where there is none, too, as nn.Linear does: `TrainedBias` reads what is registered.
        start = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", start)
        self.set_weight(zeros(torch.Size((out_features, in_features)), dtype, blocksize, double_quant, device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """Quantize a linear layer; its bias is shared. A layer on device meta gives one on device meta."""
        weight = linear.weight
        new = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=compute_dtype,
            blocksize=blocksize,
            double_quant=double_quant,
            dtype=weight.dtype,
            device="meta",
        )
        new.bias = linear.bias
        if not weight.is_meta:
            new.set_weight(NF4Weight.quantize(weight, blocksize, double_quant))
        return new.train(linear.training)

    def nf4_weight(self) -> NF4Weight:
        """The packed weight, sharing this module's tensors."""
        return NF4Weight(
            codes=self.weight.data,
            absmax=self.absmax,
            quant_map=self.quant_map,
            blocksize=self.blocksize,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.weight_dtype,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
            nested_quant_map=self.nested_quant_map,
            nested_blocksize=self.nested_blocksize,
        )

    def stored_scales(self) -> dict[str, tuple[str, str]]:
        return {name: ("weight", name) for name in SCALES}

    def set_weight(self, w: NF4Weight) -> None:
        """Take a packed weight's tensors as this module's own, with its block sizes.

        Raises:
            ValueError: it has another shape.
        """
        self._check_shape(w)
        self.weight = nn.Parameter(w.codes, requires_grad=False)
        for name in SCALES:
            self.register_buffer(name, getattr(w, name))
        self._set_sizes(w)

    def _check_shape(self, w: NF4Weight) -> None:
        shape = (self.out_features, self.in_features)
        if tuple(w.shape) != shape:
            raise ValueError(f"an NF4 weight of shape {tuple(w.shape)} does not fit a layer of shape {shape}")

    def _set_sizes(self, w: NF4Weight) -> None:
        self.blocksize = w.blocksize
        self.nested_blocksize = w.nested_blocksize
        self.weight_dtype = w.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as (out_features, in_features), by default in the dtype that the layer was made, or cast to, last."""
        return self.nf4_weight().dequantize(dtype)

    def to_dense(self, dtype: torch.dtype | None = None, weight: Tensor | None = None) -> nn.Module:
        """The `Linear` or `Conv1D` that this layer replaced, with a dense weight (dtype None: the one it had).

        Args:
            weight: (out_features, in_features), to hold instead of the dequantized weight.
        """
        weight = self.dequantize(dtype) if weight is None else weight
        bias = self.bias
        dense: nn.Module
        with torch.device("meta"):
            if getattr(self, "from_conv1d", False):
                from transformers.pytorch_utils import Conv1D

                dense, weight = Conv1D(self.out_features, self.in_features), weight.t().contiguous()
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=bias is not None)
        dense.weight = nn.Parameter(weight)
        if bias is not None:
            dense.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
        return dense.train(self.training)

    @classmethod
    def make_dense(cls, model: nn.Module, dtype: torch.dtype | None) -> None:
        make_dense(model, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in x's dtype, or under autocast in autocast's."""
        return linear(x, self.packed(), self.bias, compute_dtype=self.compute_dtype)

    def packed(self) -> NF4:
        """The weight as the operations take it, sharing this module's tensors."""
        # Not as attributes: nn.Module looks for those in three places, six times at every token of every layer.
        weight: Any = self._parameters["weight"]
        held: Any = self._buffers
        return NF4(
            weight,
            held["absmax"],
            held["quant_map"],
            held["nested_absmax"],
            held["nested_quant_map"],
            held["offset"],
            self.out_features,
            self.in_features,
            self.blocksize,
            self.nested_blocksize,
        )

    def extra_repr(self) -> str:
        """The sizes, and the bits that a weight takes with its scales."""
        w = self.nf4_weight()
        bits = 8 * (w.nbytes / max(1, w.shape.numel()))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, double_quant={w.double_quant}, {bits:.2f} bits a weight"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        # `.half()` and `.to(dtype)` mean the numbers a layer computes with, and comes back in, not the code of its
        # weight: codes and scales follow to a device, never to a dtype.
        fixed = {id(t) for t in (self.weight, *(self._buffers[name] for name in SCALES))}
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight.device)).dtype

        def keep_dtype(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device) if id(t) in fixed and new.dtype != t.dtype else new

        return super()._apply(keep_dtype, recurse)

"""The layers that stay dense in a quantized model: mostly the output head, a generated token's largest product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minipeft.packed import Packed
from minipeft_kernels.linear.op import linear


class DenseLinear(nn.Linear):
    """An `nn.Linear` that on a CPU is multiplied by `linear` while its weight is not being trained.

    For a float32 head of 49,152 rows and one token that is 2.6 ms instead of 6.3 (AMD EPYC, AVX-512, 2 threads), and
    in 16 bits on a CPU that would emulate them the arithmetic is float32. Otherwise it is what it was.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # That which acts: one that is computed at every call, as by `torch.nn.utils.parametrize`, is no parameter.
        weight = self.weight
        return linear(x, weight, self.bias) if _is_frozen(weight, x) else super().forward(x)


def _is_frozen(weight: Tensor, x: Tensor) -> bool:
    if type(weight) is not nn.Parameter or not x.is_cpu or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    return x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")


def keep_dense(model: nn.Module) -> None:
    """Make each plain `nn.Linear` of a quantized model a `DenseLinear`: the same module, of another class."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear


def make_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Put a frozen dense form in the place of each packed module of `model`, and undo `keep_dense`.

    Args:
        dtype: Of all parameters then; None leaves each its own.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Packed):
            dense = module.to_dense().requires_grad_(False)
            if dense is not module:
                model.set_submodule(path, dense)
    make_plain(model, dtype)


def make_plain(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Undo `keep_dense`, and cast the parameters to `dtype` if one is given.

    Buffers stay as they are: rotary frequencies are in 32 bits, or complex (Llama 4), in a model of any dtype.
    """
    for module in model.modules():
        if type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)

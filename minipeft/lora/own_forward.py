"""Layers whose class or instance has a forward of its own, which may do more than W x + b.

Beside the layer the update is added to what that forward returns; in the weight it goes through it. Whether these are
the same is tried on a few inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.dispatched import device_of
from minipeft.mixins import plain_class

# Inputs that are tried, and the most rounding errors of the layer's dtype by which outputs may differ.
_ROWS, _ROUNDINGS = 4, 64


@torch.no_grad()
def merges_alike(layer: Any, forward: Callable[[Tensor], Any], merged: Tensor, scaled: bool = False) -> bool:
    """True if `forward`, the layer's own, gives (merged - W) x more under the weight `merged` than under W.

    Args:
        layer: A layer with LoRA, linear or an embedding.
        merged: (out_features, in_features).
        scaled: The layer's output is scaled, too (DoRA): then it must be W x + b, and nothing more.
    """
    weight = layer.dense_weight()
    change = merged - weight
    if isinstance(layer, nn.Embedding):
        x = torch.arange(min(_ROWS, layer.num_embeddings), device=weight.device)
        scale = getattr(layer, "embed_scale", 1.0)
        plain, expected = weight[:, x].T * scale, change[:, x].T * scale
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_ROWS, layer.in_features, generator=generator).to(device_of(layer), _dtype(layer))
        bias = None if layer.bias is None else layer.bias.to(change.dtype)
        plain, expected = (F.linear(x.to(change.dtype), *both) for both in ((weight, bias), (change,)))
    try:
        outputs = [forward(x), _under(layer, forward, x, merged)]
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes more than one input
    if not all(isinstance(out, Tensor) and out.shape == expected.shape for out in outputs):
        return False
    before, after = (out.to(change.dtype) for out in outputs)
    largest = max(float(values.abs().max()) for values in (before, after, expected))
    bound = _ROUNDINGS * torch.finfo(_dtype(layer)).eps * largest
    off = [after - before - expected, *([before - plain] if scaled else [])]
    return all(float(values.abs().max()) <= bound for values in off)


def unchanged(layer: Any, out: Any) -> Any:
    """The output `out` of the layer's own forward, which is no tensor, where no adapter acts.

    Raises TypeError where one does: an update is added to a tensor.
    """
    if not layer.acting() and layer.switch.rows is None:
        return out
    cls, given = plain_class(layer), type(out).__name__
    raise TypeError(
        f"the forward of {cls.__module__}.{cls.__qualname__} returned a {given}, LoRA adds to a tensor: "
        "leave such layers out by exclude_modules, or adapt a layer inside or after them"
    )


def _dtype(layer: Any) -> torch.dtype:
    held: torch.dtype = layer.base_weight().dtype
    return held if held.is_floating_point else layer.weight_dtype


def _under(layer: Any, forward: Callable[[Tensor], Any], x: Tensor, merged: Tensor) -> Any:
    """The output of `forward` for `x` while `merged` is the layer's weight."""
    held = layer._parameters[layer.weight_name]
    if not held.is_floating_point():
        # A merged 4-bit layer multiplies with the dense weight.
        bias = layer.bias
        return F.linear(x.to(merged.dtype), merged, None if bias is None else bias.to(merged.dtype))
    try:
        dense = layer.as_weight(merged).contiguous().to(held.dtype)
        layer._parameters[layer.weight_name] = nn.Parameter(dense, requires_grad=False)
        return forward(x)
    finally:
        layer._parameters[layer.weight_name] = held

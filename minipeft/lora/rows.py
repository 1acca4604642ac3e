"""LoRA by row: a layer's base product is made once for the whole batch, each adapter's update of its own rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minipeft.lora.config import LoraConfig
from minipeft.rows import RowAdapters


def add_row_updates(layer: Any, rows: RowAdapters, x: Tensor, base: Tensor) -> Tensor:
    """The output of the LoRA layer `layer`, whose base gave `base` (rows, ...) for `x` (rows, ...)."""
    out = base.clone()
    for adapter, index in rows.groups(len(x), x.device):
        if layer.adapts(adapter):
            own = base[index]
            out.index_copy_(0, index, layer.variants[adapter].apply(layer, adapter, x[index], own, own))
    return out


def rows_through(layer: Any, names: Sequence[str] | None, *args: Any, **kwargs: Any) -> Any:
    """`layer(*args, **kwargs)` alone, each row through the adapter that `names` has for it; None for those that act.

    Raises ValueError for another number of names than rows.
    """
    shared = layer.switch.shared
    before, shared.by_row = shared.by_row, shared.by_row if names is None else RowAdapters(names)
    try:
        return layer(*args, **kwargs)
    finally:
        shared.by_row = before


def check_unmerged(merged: Sequence[str]) -> None:
    """Raise ValueError if adapters, `merged`, are merged into a module whose rows are to go through their own."""
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. Here "
            f"{list(merged)} are merged."
        )


def check_rows(name: str, config: LoraConfig) -> None:
    """Raise ValueError for an adapter that replaces base tensors, which are the whole batch's."""
    if config.init_lora_weights == "loftq":
        raise ValueError(f"adapter_names: {name!r} is LoftQ: it replaces the base weight for the whole batch")
    if config.bias != "none":
        raise ValueError(f"adapter_names: {name!r} has bias={config.bias!r}: biases of its own for the whole batch")

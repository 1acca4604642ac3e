"""Several LoRA adapters in one batch: each row of the input goes through an adapter of its own.

The switch that all adapted modules share holds the assignment, so a call sets one field and walks over no modules. A
layer's base product is made once for the whole batch; each adapter's update is made of its own rows alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.adapter import AdaptedModel
from minipeft.attach import config_of
from minipeft.lora.config import LoraConfig

# A row of this name goes through the base model (PEFT's word for it).
BASE_ROW = "__base__"


class RowAdapters:
    """The assignment of an adapter to each row of a batch.

    Args:
        names: One a row.
        repeated: True if a layer may get each row several times in succession, as in `generate` with beams or with
            several sequences a prompt (there an encoder gets each row once, the decoder as many times as beams).
    """

    def __init__(self, names: Sequence[str], repeated: bool = False) -> None:
        self.names = tuple(names)
        self.repeated = repeated
        self._groups: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = {}

    def groups(self, rows: int, device: torch.device) -> list[tuple[str, Tensor]]:
        """(adapter, the indices of its rows) for an input of `rows` rows; base rows are in none.

        Raises ValueError when the number of names does not fit that of the rows.
        """
        if (rows, device) not in self._groups:
            self._groups[rows, device] = self._make_groups(rows, device)
        return self._groups[rows, device]

    def _make_groups(self, rows: int, device: torch.device) -> list[tuple[str, Tensor]]:
        times, rest = divmod(rows, len(self.names))
        if rest or times == 0 or (times > 1 and not self.repeated):
            raise ValueError(
                f"adapter_names has {len(self.names)} names, but an adapted layer got an input of {rows} rows: there "
                "must be one name for each row of the batch, and the layer's input must keep the rows apart"
            )
        indices: dict[str, list[int]] = {}
        for row in range(rows):
            indices.setdefault(self.names[row // times], []).append(row)
        return [(name, torch.tensor(i, device=device)) for name, i in indices.items() if name != BASE_ROW]


def add_row_updates(layer: Any, rows: RowAdapters, x: Tensor, base: Tensor) -> Tensor:
    """The output of the LoRA layer `layer`, whose base gave `base` (rows, ...) for `x` (rows, ...)."""
    out = base.clone()
    for adapter, index in rows.groups(len(x), x.device):
        if layer.adapts(adapter):
            own = base[index]
            out.index_copy_(0, index, layer.variants[adapter].apply(layer, adapter, x[index], own, own))
    return out


@contextlib.contextmanager
def by_row(model: AdaptedModel, names: Sequence[str], repeated: bool = False) -> Iterator[None]:
    """Inside the block each row of a batch goes through the adapter that `names` has for it.

    Args:
        repeated: See `RowAdapters`.

    Raises ValueError in training mode, for unknown adapters, those of other methods, and those that replace base
        tensors.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"adapter_names must be a list with one name for each row of the batch, got {names!r}")
    if model.training:
        raise ValueError("adapter_names is for inference: call model.eval() first")
    for name in dict.fromkeys(names):
        if name != BASE_ROW:
            _check_rows_of(name, config_of(model, name))
    before, model._switch.by_row = model._switch.by_row, RowAdapters(names, repeated)
    try:
        yield
    finally:
        model._switch.by_row = before


def _check_rows_of(name: str, config: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter_names: {name!r} is no LoRA adapter ({type(config).__name__})")
    if config.init_lora_weights == "loftq":
        raise ValueError(f"adapter_names: {name!r} is LoftQ: it replaces the base weight for the whole batch")
    neutral: tuple[Any, ...] = (None, [], "none")
    whole = [f for f in ("bias", "modules_to_save", "target_parameters") if getattr(config, f) not in neutral]
    if whole:
        raise ValueError(f"adapter_names: {name!r} has {whole[0]}: tensors of its own for the whole batch")

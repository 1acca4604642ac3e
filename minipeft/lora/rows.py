"""Several LoRA adapters in one batch: each row of the input goes through an adapter of its own.

The switch that all adapted modules share holds the assignment, so a call sets one field and walks over no modules. A
layer's base product is made once for the whole batch; each adapter's update is made of its own rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A row of this name goes through the base model (PEFT's word for it).
BASE_ROW = "__base__"


class RowAdapters:
    """Which adapter each row of a batch goes through.

    Args:
        names: One a row.
        repeated: Whether a layer may get each row several times in succession, as in `generate` with beams or with
            several sequences a prompt (there an encoder gets each row once, the decoder as many times as beams).
    """

    def __init__(self, names: Sequence[str], repeated: bool = False) -> None:
        self.names = tuple(names)
        self.repeated = repeated
        self._groups: dict[tuple[int, torch.device], list[tuple[str, Tensor]]] = {}

    def groups(self, rows: int, device: torch.device) -> list[tuple[str, Tensor]]:
        """(adapter, the indices of its rows) for an input of `rows` rows; base rows are in none.

        Raises ValueError when the names are not for so many rows.
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
            out.index_copy_(0, index, layer.add_update(adapter, x[index], own, own))
    return out

"""Several adapters in one batch: each row of the input goes through an adapter of its own.

The switch that all adapted modules share holds the assignment, so a call sets one field and walks over no modules. A
method's modules look at it in their forward (`Switch.rows`), and its `Registration.rows` says which adapters can do so.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.adapter import AdaptedModel
from minipeft.attach import config_of
from minipeft.meta import recall_adapters
from minipeft.methods import METHODS

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
        self._groups: dict[tuple[int, torch.device, bool], list[tuple[str, Tensor]]] = {}

    def groups(self, rows: int, device: torch.device, parts: bool = False) -> list[tuple[str, Tensor]]:
        """(adapter, the indices of its rows) for an input of `rows` rows; base rows are in none.

        Args:
            parts: True for an input whose rows are the tokens of the batch's, one after the other.

        Raises ValueError when the number of names does not fit that of the rows.
        """
        key = rows, device, parts
        if key not in self._groups:
            self._groups[key] = self._make_groups(*key)
        return self._groups[key]

    def _make_groups(self, rows: int, device: torch.device, parts: bool) -> list[tuple[str, Tensor]]:
        times, rest = divmod(rows, len(self.names))
        if rest or times == 0 or (times > 1 and not self.repeated and not parts):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} names, but an adapted layer got an input of {rows} rows; it must keep the batch's "
                "rows apart"
            )
        indices: dict[str, list[int]] = {}
        for row in range(rows):
            indices.setdefault(self.names[row // times], []).append(row)
        return [(name, torch.tensor(i, device=device)) for name, i in indices.items() if name != BASE_ROW]


@contextlib.contextmanager
def by_row(model: AdaptedModel, names: Sequence[str], repeated: bool = False) -> Iterator[None]:
    """Inside the block each row of a batch goes through the adapter that `names` has for it.

    Args:
        repeated: See `RowAdapters`.

    Raises ValueError in training mode, for unknown adapters, those of methods that cannot tell rows apart, and those
        that replace base tensors.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"adapter_names must be a list with one name for each row of the batch, got {names!r}")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
    unknown = [name for name in dict.fromkeys(names) if name != BASE_ROW and name not in model.peft_config]
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {sorted(model.peft_config)}"
        )
    for name in dict.fromkeys(names):
        if name != BASE_ROW:
            config = config_of(model, name)
            check = model._row_checks.get(name)
            if check is None:
                able = ", ".join(method.name for method in METHODS.values() if method.rows is not None)
                raise ValueError(
                    f"adapter_names: {name!r} acts on the whole batch ({type(config).__name__}); adapters of these "
                    f"methods can go by row: {able}"
                )
            check(name, config)
    before, model._switch.by_row = model._switch.by_row, RowAdapters(names, repeated)
    try:
        yield
    finally:
        model._switch.by_row = before


class CallsByRow(AdaptedModel):
    """The calls of a model that take an adapter for each row of a batch."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_plain_class" in vars(cls):
            cls.forward = _forward_with_rows(vars(cls)["_plain_class"].forward)

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As the plain model's.

        Args:
            adapter_names: The LoRA adapter that each row of the batch goes through, "__base__" for none; for this call
                they stand in the place of the adapters that act. Inference only, as in PEFT.

        Raises ValueError for adapters that are unknown, of another method, merged, or that replace base tensors
            (biases); for another number of names than rows; and in training mode.
        """
        # Beside `forward`, which an accelerate hook hides.
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        with by_row(self, adapter_names):
            return super().__call__(*args, **kwargs)

    @property
    def generate(self) -> Callable[..., Any]:
        """`generate` of the plain model, if it has one, which then takes `adapter_names` as a call does.

        Beams and several sequences a prompt go through their prompt's adapter.
        """
        own: Any = vars(self).get("generate")
        if own is not None:  # set on the object, as by FSDP and accelerate, around what this property gave
            return own
        plain = super().generate  # type: ignore[misc]

        @functools.wraps(plain)
        def generate(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
            with by_row(self, adapter_names, repeated=True) if adapter_names is not None else contextlib.nullcontext():
                return plain(*args, **kwargs)

        return generate

    @generate.setter
    def generate(self, value: Callable[..., Any]) -> None:
        vars(self)["generate"] = value

    @generate.deleter
    def generate(self) -> None:
        del vars(self)["generate"]


def _forward_with_rows(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a model, which takes `adapter_names` as `CallsByRow.__call__` does."""

    # With the plain forward's signature, which Trainer and `generate` read.
    @functools.wraps(plain)
    def forward(self: AdaptedModel, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        recall_adapters(self)
        if adapter_names is None:
            return plain(self, *args, **kwargs)
        with by_row(self, adapter_names):
            return plain(self, *args, **kwargs)

    return forward

"""The rows of a weight that an adapter trains: the vectors of chosen tokens, in an embedding and in a head tied to it.

An adapter has a copy of its rows (PEFT's `trainable_tokens_delta`, which despite its name holds the vectors
themselves), and while it acts they stand in the places of the base's. All else stays frozen.

The class attribute `weight` stands before the registered parameter whenever somebody reads `module.weight`, so the
plain forward, a loss that multiplies with the head's weight, and LoRA on the head meet the trained rows without
knowing. A module whose base weight is the same parameter (a tied head) follows: it has no rows of its own, and reads
those of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule
from minipeft.copies import is_handled, without_mixins
from minipeft.dispatched import in_memory, put

DELTA = "trainable_tokens_delta"


class TokenAdapter(nn.Module):
    """The trained rows of one module, under the name that PEFT gives to their holder.

    Attributes (keyed by adapter name, as in PEFT):
        trainable_tokens_delta: the rows (tokens, features).
        token_indices: the numbers of the rows, in the same order.
    """

    _of: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, list[int]] = {}
        # Past nn.Module, which would register the module inside its own part.
        vars(self)["_of"] = module

    @property
    def weight(self) -> Tensor:
        """As the module's: with the rows that act now."""
        return self._of.weight

    @property
    def trainable_tokens_original(self) -> dict[str, Tensor]:
        """adapter name -> the base weight's rows in whose place its own stand."""
        rows: dict[str, Tensor] = self._of.trainable_tokens_original
        return rows

    @property
    def active_adapter(self) -> list[str]:
        """The adapters that are set to act."""
        names: list[str] = self._of.active_adapters
        return names

    active_adapters = active_adapter

    @property
    def merged_adapters(self) -> list[str]:
        """Those of the adapters here that are merged."""
        return [name for name in self._of.merged_adapters if name in self.token_indices]


class TrainedRows(AdapterModule):
    """A module with a 2-D weight of which adapters train some rows.

    Attributes:
        row_leaders: adapter -> the module whose rows this one follows.
        row_keys: adapter -> the name of its rows in its file; None for a follower's that the file leaves out.
    """

    name_prefix: ClassVar[str] = "TokensTrained"
    # In front of LoRA, so that merging puts the rows in before LoRA adds its update.
    outermost: ClassVar[int] = 1
    _own_attributes: ClassVar[tuple[str, ...]] = ("token_adapter", "row_leaders", "row_keys", "_merged_rows")
    adapter_layer_names: ClassVar[tuple[str, ...]] = (DELTA,)
    other_param_names: ClassVar[tuple[str, ...]] = ("token_indices", "trainable_tokens_original")

    row_leaders: dict[str, Any]
    row_keys: dict[str, str | None]
    _merged_rows: tuple[list[str], nn.Parameter] | None

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if "row_leaders" not in vars(self):
            self.row_leaders, self.row_keys, self._merged_rows = {}, {}, None

    def add_rows(
        self, adapter: str, dtype: torch.dtype, init: bool, indices: Sequence[int], key: str, random: bool = False
    ) -> None:
        """Give `adapter` a copy, in `dtype`, of the rows of these numbers.

        Args:
            init: Not used: rows that are loaded start as the base's, too.
            key: Their name in the adapter's file.
            random: Start from random numbers instead.
        """
        if "token_adapter" not in self._modules:
            self._modules["token_adapter"] = TokenAdapter(self)
        own: Any = self._modules["token_adapter"]
        with in_memory(self):
            rows = self._base_weight().detach()[list(indices)].to(dtype, copy=True)
        own.trainable_tokens_delta[adapter] = nn.Parameter(rows.normal_() if random else rows)
        own.token_indices[adapter] = list(indices)
        self.row_keys[adapter] = key

    def follow_rows(self, adapter: str, dtype: torch.dtype, init: bool, leader: Any, key: str | None = None) -> None:
        """Let the rows of `adapter` be those that it has in `leader`.

        Args:
            dtype, init: Not used.
            key: The name under which the adapter's file has them for this module, too.
        """
        self.row_leaders[adapter] = leader
        self.row_keys[adapter] = key

    @property
    def token_adapter(self) -> TokenAdapter:
        """The holder of the rows: this module's own, or that of the module that it follows."""
        own: Any = self._modules.get("token_adapter")
        if own is not None:
            return own
        if not self.row_leaders:
            return TokenAdapter(self)  # of nobody, since the adapters that followed others here are deleted
        holder: TokenAdapter = next(iter(self.row_leaders.values())).token_adapter
        return holder

    @token_adapter.deleter
    def token_adapter(self) -> None:
        """Nothing to do: nn.Module deletes the holder, which a follower lacks."""

    @property
    def trainable_tokens_delta(self) -> nn.ParameterDict:
        """adapter -> its rows (tokens, features)."""
        return self.token_adapter.trainable_tokens_delta

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """adapter -> the numbers of its rows."""
        return self.token_adapter.token_indices

    @property
    def trainable_tokens_original(self) -> dict[str, Tensor]:
        """adapter -> the base's rows in the places of its own."""
        base = self._base_weight().detach()
        return {name: base[indices] for name, indices in self.token_indices.items()}

    @property
    def original_module(self) -> Any:
        """The module without adapters (PEFT's name): see `copies.without_mixins`."""
        return without_mixins(self)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are set to act and have something in this module."""
        return [adapter for adapter in self.switch.active if adapter in self.adapter_names()]

    @property
    def _adapters(self) -> set[str]:
        return self.adapter_names()

    # The weight

    @property
    def weight(self) -> Tensor:
        """The base weight with the rows of the adapters that act now, in the base weight's dtype.

        With LoRA's update, where the module behind this mixin gives it to who reads its weight (`lora/head.py`).
        """
        own, updated = self.weight_with_rows(), getattr(self, "updated", None)
        return own if updated is None or own is None or is_handled(self, own) else updated(own)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        vars(self)["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        if vars(self).pop("weight", self) is self:
            raise AttributeError("weight")

    def weight_with_rows(self) -> Tensor:
        """(rows, features): the base weight with the rows of the adapters that act now."""
        held: Any = vars(self) if "weight" in vars(self) else self._parameters
        if "weight" not in held:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")
        base: Tensor = held["weight"]
        # While merged, and while `fold` puts them in, the rows are in the base weight.
        if base is None or "weight" in self._originals or self.merged_adapters or is_handled(self, base):
            return base
        return self._with_rows(base, self._with_rows_here(self.switch.acting))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward, which reads `weight`; each row of a batch with its adapter's rows if asked for."""
        out: Tensor = super().forward(x, *args, **kwargs)
        if self.switch.rows is None or self.merged_adapters:
            return out
        out = out.clone()
        for adapter, index in self.switch.rows.groups(len(x), x.device):
            if adapter in self.row_keys:
                own, plain = self._plain_output(x[index], [adapter]), self._plain_output(x[index], [])
                # An embedding carries no LoRA beside its rows; what a head's LoRA added to `out` stays.
                own = own if isinstance(self, nn.Embedding) else out[index] + (own - plain)
                out.index_copy_(0, index, own.to(out.dtype))
        return out

    def _plain_output(self, x: Tensor, adapters: list[str]) -> Tensor:
        twin = without_mixins(self)
        weight = self._with_rows(self._base_weight(), adapters)
        vars(twin)["_parameters"] = {**self._parameters, "weight": weight}
        out: Tensor = twin(x)
        return out

    def _with_rows_here(self, adapters: Sequence[str]) -> list[str]:
        return [adapter for adapter in adapters if adapter in self.row_keys]

    def _with_rows(self, base: Tensor, adapters: list[str]) -> Tensor:
        for adapter in adapters:
            rows, indices = self._rows_of(adapter)
            base = base.index_copy(0, torch.tensor(indices, device=base.device), rows.to(base.device, base.dtype))
        return base

    def _rows_of(self, adapter: str) -> tuple[Tensor, list[int]]:
        holder = self.row_leaders.get(adapter, self).token_adapter
        return holder.trainable_tokens_delta[adapter], holder.token_indices[adapter]

    def _base_weight(self) -> Tensor:
        held: Any = self._originals.get("weight", self._parameters.get("weight"))
        return held

    # The contract of an adapted module

    def adapter_names(self) -> set[str]:
        return super().adapter_names() | set(self.row_keys)

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        state = super().adapter_state(adapter)
        key = self.row_keys.get(adapter)
        if key is None or adapter in self.row_leaders:
            return state
        return {**state, key: self.token_adapter.trainable_tokens_delta[adapter]}

    def stored_state(self, adapter: str, values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        state = super().stored_state(adapter, values)
        key = self.row_keys.get(adapter)
        if key is None or adapter not in self.row_leaders:
            return state
        # safetensors refuses two names for the same memory.
        return {**state, key: values(self._rows_of(adapter)[0]).clone()}

    def stored_as(self, adapter: str) -> str:
        key = self.row_keys.get(adapter)
        if adapter not in self.row_keys:
            return super().stored_as(adapter)
        return "base_layer.weight" if key == DELTA else "token_adapter.base_layer.weight"

    def replaced_tensors(self, adapter: str) -> list[str]:
        indices = self._rows_of(adapter)[1] if adapter in self.row_keys else []
        return [*super().replaced_tensors(adapter), *(f"weight[{index}]" for index in indices)]

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self.row_leaders.pop(adapter, None)
        self.row_keys.pop(adapter, None)
        own: Any = self._modules.get("token_adapter")
        if own is not None and adapter in own.token_indices:
            del own.trainable_tokens_delta[adapter], own.token_indices[adapter]

    @torch.no_grad()
    def fold(self, adapters: tuple[str, ...]) -> None:
        here = self._with_rows_here(adapters)
        if here:
            leaders = {id(self.row_leaders.get(adapter, self)): self.row_leaders.get(adapter, self) for adapter in here}
            source = next(iter(leaders.values())) if len(leaders) == 1 else self
            # Tied weights stay one parameter.
            original = put(self, "weight", source._merged_weight(here))
            self._originals.setdefault("weight", original)
        super().fold(adapters)

    def _merged_weight(self, adapters: list[str]) -> nn.Parameter:
        if self._merged_rows is None or self._merged_rows[0] != adapters:
            with in_memory(self):
                weight = self._with_rows(self._base_weight().detach(), adapters)
            self._merged_rows = (adapters, nn.Parameter(weight, requires_grad=False))
        return self._merged_rows[1]

    def merged_finite(self, adapters: tuple[str, ...]) -> bool:
        rows = [self._rows_of(adapter)[0] for adapter in self._with_rows_here(adapters)]
        return all(bool(torch.isfinite(r).all()) for r in rows) and super().merged_finite(adapters)

    def unmerge(self) -> None:
        super().unmerge()
        self._merged_rows = None

"""Modules whose weight is the input embedding's, and adapters that keep them tied (`ensure_weight_tying`).

The input embedding leads: it has the adapter's tensors, the modules tied to it follow. Files have them for each module.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn

from minipeft.adapter import AdapterModule, Part, base_modules
from minipeft.copies import TrainedModule


def tied_with_embedding(model: Any) -> list[str]:
    """The dotted names of the modules whose weight is the input embedding's, without the embedding, sorted.

    There are none if the model's config does not say `tie_word_embeddings`, nor its class which weights it ties.
    """
    ties = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    path = _embedding_path(model) if ties and getattr(model, "_tied_weights_keys", None) else None
    if path is None:
        return []
    embedding = model.get_submodule(path)
    weight = _base_weight(embedding)
    modules = [(name, part) for name, part in model.named_modules(remove_duplicate=False) if name]
    return sorted(name for name, part in modules if name != path and _base_weight(part) is weight)


def tied_group(model: Any) -> list[str]:
    """The dotted names of the input embedding and of the modules tied to it, the embedding first; none if none is."""
    tied = set(tied_with_embedding(model))
    others = [name for name, _ in base_modules(model) if name in tied] if tied else []
    path = _embedding_path(model) if others else None
    return [] if path is None else [path, *others]


def _embedding_path(model: Any) -> str | None:
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        return None
    return next((name for name, part in model.named_modules() if part is embedding and name), None)


def _base_weight(module: nn.Module) -> Any:
    held = getattr(module, "_originals", {}).get("weight", module._parameters.get("weight"))
    return module if held is None else held


class TiedModule(AdapterModule):
    """A module in which adapters have the tensors that they have in another one, whose weight is the same.

    Attributes:
        tied_to: adapter -> the module that this one follows.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("tied_to",)

    tied_to: dict[str, Any]

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if "tied_to" not in vars(self):
            self.tied_to = {}

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self.tied_to.pop(adapter, None)

    def fold(self, adapters: tuple[str, ...]) -> None:
        super().fold(adapters)
        here = self.adapter_names() & set(adapters)
        leader = next((self.tied_to[adapter] for adapter in here if adapter in self.tied_to), None)
        if leader is None or here - self.tied_to.keys() or leader.adapter_names() & set(adapters) != here:
            return
        if leader.merged_adapters == list(adapters):
            # Tied weights stay one parameter.
            self._parameters["weight"] = leader._parameters["weight"]


class TiedCopy(TiedModule, TrainedModule):
    """A module that an adapter trains whole (`modules_to_save`) by a copy whose weight is that of the leader's copy."""

    name_prefix: ClassVar[str] = "TiedCopy"

    def add_copy(self, adapter: str, dtype: torch.dtype | None = None) -> None:
        held, self.tied_to = self.tied_to, {}
        try:
            super().add_copy(adapter, dtype)
        finally:
            self.tied_to = held

    def tie_copy(self, adapter: str, dtype: torch.dtype, init: bool, leader: Any) -> None:
        """Give `adapter` a copy of this module, in `dtype`, with the weight of the copy that it has of `leader`.

        Args:
            init: Not used: a copy that is loaded starts as the base's, too.
        """
        if adapter not in self.modules_to_save:
            self.add_copy(adapter, dtype)
        if leader is not self:
            self.modules_to_save[adapter].weight = leader.modules_to_save[adapter].weight
            self.tied_to[adapter] = leader


def tied_copies(model: nn.Module, group: list[str]) -> list[Part]:
    """The parts of an adapter that trains the modules called `group`, whose weight is one, by copies with one weight.

    Raises ValueError for a module that carries an adapter which does not train it whole.
    """
    modules = dict(base_modules(model))
    leader = modules[group[0]]
    for path in group:
        module = modules[path]
        if isinstance(module, AdapterModule) and not isinstance(module, TrainedModule):
            raise ValueError(
                f"modules_to_save with ensure_weight_tying: {path!r} already carries another adapter's "
                f"{type(module).__name__}"
            )
    return [Part(path, TiedCopy, functools.partial(TiedCopy.tie_copy, leader=leader)) for path in group]

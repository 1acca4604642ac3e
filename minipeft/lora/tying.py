"""LoRA on tied modules (`ensure_weight_tying`): one update, of the input embedding, which the others follow.

An embedding's weight W (vocabulary, hidden) takes the update (B A)^T, with A (r, vocabulary) and B (hidden, r); a head
that has the same W takes it as A^T B^T. So its factors are the embedding's, transposed and in the other order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapter import Part, base_modules
from minipeft.lora.config import LoraConfig
from minipeft.tying import TiedModule, tied_copies, tied_group


class _Transposed(nn.Module):
    """In the place of a linear layer of LoRA's: its weight is another module's factor, transposed."""

    def __init__(self, leader: nn.Module, name: str, adapter: str) -> None:
        super().__init__()
        # Past nn.Module, which would register the leader as a part of this one.
        vars(self)["_of"] = (leader, name, adapter)

    @property
    def weight(self) -> Tensor:
        leader, name, adapter = vars(self)["_of"]
        factor: Tensor = getattr(leader, name)[adapter]
        return factor.T

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight)


class TiedLora(TiedModule):
    """A module with LoRA whose factors are those of the input embedding."""

    name_prefix: ClassVar[str] = "Tied"

    lora_A: Any
    lora_B: Any

    def tie_factors(self, adapter: str, dtype: torch.dtype, init: bool, leader: Any) -> None:
        """Put the factors and the scaling that `adapter` has in `leader` in the place of those that it has here.

        Args:
            dtype, init: Not used.
        """
        self.tied_to[adapter] = leader
        for name in ("r", "lora_alpha", "scaling"):
            getattr(self, name)[adapter] = getattr(leader, name)[adapter]
        if isinstance(self, nn.Embedding):
            for name in ("lora_embedding_A", "lora_embedding_B"):
                getattr(self, name)[adapter] = getattr(leader, name)[adapter]
        else:
            self.lora_A[adapter] = _Transposed(leader, "lora_embedding_B", adapter)
            self.lora_B[adapter] = _Transposed(leader, "lora_embedding_A", adapter)

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        state = super().adapter_state(adapter)
        # Views that autograd follows would hold the leader's parameters, which could get no other memory then.
        return {n: t if isinstance(t, nn.Parameter) else t.detach() for n, t in state.items()}

    def stored_state(self, adapter: str, values: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        if adapter not in self.tied_to or isinstance(self, nn.Embedding):
            return super().stored_state(adapter, values)
        lora_A, lora_B = self.tied_to[adapter].factors(adapter)
        # The parameters' values are asked for: those here are views of them.
        own = {"lora_A.weight": lora_B, "lora_B.weight": lora_A}
        state = {name: tensor for name, tensor in self.adapter_state(adapter).items() if name not in own}
        stored = {name: values(tensor) for name, tensor in state.items()}
        return {**{name: values(tensor).T.contiguous() for name, tensor in own.items()}, **stored}


def tied_with(model: nn.Module, config: LoraConfig, paths: list[str]) -> list[str]:
    """The modules that `config` ties to `paths`, these included where they are tied, the input embedding first."""
    group = tied_group(model) if config.ensure_weight_tying else []
    return [] if set(group).isdisjoint(paths) else group


def tied_parts(model: nn.Module, config: LoraConfig, saved: list[str], targets: list[str]) -> list[Part]:
    """Parts that tie the updates, or the trained copies, of tied modules; with PEFT's warnings where none does.

    Raises ValueError for DoRA on tied modules, whose lengths would differ, and as `tied_copies`.
    """
    group = tied_group(model)
    adapted = not set(group).isdisjoint([*saved, *targets])
    if not config.ensure_weight_tying:
        if adapted:
            warnings.warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                f"`ensure_weight_tying` is not set to True: of {', '.join(group)} each keeps its own, so that merging "
                "unties them",
                stacklevel=2,
            )
        return []
    if not group:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model", stacklevel=2
        )
        if config.trainable_token_indices is not None:
            warnings.warn(
                "ensure_weight_tying=True but the model does not have tied weights: rows of embeddings and heads are "
                "trained each for itself",
                stacklevel=2,
            )
    elif not adapted and config.trainable_token_indices is None:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
            "`target_modules`",
            stacklevel=2,
        )
    if not set(group).isdisjoint(saved):
        return tied_copies(model, group)
    if not adapted:
        return []
    if config.use_dora:
        raise ValueError(
            f"ensure_weight_tying=True with use_dora=True: {', '.join(group)} would have one update, but lengths of "
            "their own; leave one of the two out"
        )
    leader = dict(base_modules(model))[group[0]]
    return [Part(path, TiedLora, functools.partial(TiedLora.tie_factors, leader=leader)) for path in group[1:]]

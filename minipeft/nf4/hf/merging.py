"""One stack of weights from files that hold experts one by one, without holding any of them twice.

transformers stacks the experts' `gate_proj`s, then their `up_proj`s, and then concatenates the two stacks: at the end
all of them are in memory twice. Here each weight is copied to its place in the result, and let go.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


class MergeAndConcatenate(MergeModulelist):
    """`MergeModulelist` and the `Concatenate` after it, along dimension `along` of the stacks."""

    along: int

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Lists of the experts' weights by pattern in, {the target: (experts, ...)} out."""
        lists = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        shapes = [{tuple(weight.shape) for weight in weights} for weights in lists]
        alike = all(len(shape) == 1 for shape in shapes) and len({len(weights) for weights in lists}) == 1
        if not alike:
            # transformers has the words for it.
            merged = super().convert(input_dict, source_patterns, target_patterns, **kwargs)
            done: dict[str, torch.Tensor] = Concatenate(self.along).convert(
                merged, source_patterns, target_patterns, **kwargs
            )
            return done
        input_dict.clear()
        first, experts = lists[0][0], len(lists[0])
        widths = [weights[0].shape[self.along - 1] for weights in lists]
        shape = list(first.shape)
        shape[self.along - 1] = sum(widths)
        stack = torch.empty(experts, *shape, dtype=first.dtype, device=first.device)
        del first
        for part, weights in zip(stack.split(widths, self.along), lists, strict=True):
            for place in part:
                place.copy_(weights.pop(0))
        return {target_patterns[0]: stack}


class Concatenated(Concatenate):
    """The place of the `Concatenate` whose work is done, so that saving can go back through it."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The dictionary that comes in."""
        return input_dict


def without_copies(conversion: Any) -> Any:
    """`conversion`, or one that does the same with each weight in memory once."""
    operations = list(getattr(conversion, "operations", ()))
    if [type(one) for one in operations] != [MergeModulelist, Concatenate]:
        return conversion
    merge, concatenate = map(copy.copy, operations)
    if merge.dim != 0 or concatenate.dim < 1:
        return conversion
    merge.__class__, concatenate.__class__ = MergeAndConcatenate, Concatenated
    merge.along = concatenate.dim
    new: WeightConverter = copy.deepcopy(conversion)
    new.operations = [merge, concatenate]
    return new

"""Packed experts that a checkpoint holds one by one, as transformers 4 and unsloth wrote them, into the stacks of now.

Their names are `experts.3.w1.weight` or `experts.gate_up_projs.3.weight`, each with bitsandbytes' tensors beside it. No
weight is quantized again: an expert's codes are those of its layers, one after the other. A parameter that is made of
two layers (`gate_proj` and `up_proj`) gets their scales in float32, which double quantization would share by 256 across
the two; the values stay the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers.quantizers_utils import get_module_from_name

from minipeft.nf4.experts import STATE_SUFFIXES, expert_parameters
from minipeft.nf4.hf.load import Deserialize, LoadRecord, fill_experts, only, read_packed
from minipeft.nf4.hf.merging import Concatenated
from minipeft.nf4.stack import NF4ExpertsWeight
from minipeft.nf4.weight import NF4Weight

_QUANT_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


def names_for(model: nn.Module, files: Iterable[Any] | None) -> list[str] | None:
    """The names of the tensors in the files of `model`; None if it has no experts, or a file is no safetensors."""
    files = [str(file) for file in files or ()]
    if not any(expert_parameters(module) for module in model.modules()):
        return None
    if not files or not all(file.endswith(".safetensors") for file in files):
        return None
    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def packed_in(names: list[str], model: Any) -> dict[str, set[str]]:
    """The weights of experts that a checkpoint has packed: name in `model` -> the names of its parts in the file."""
    held = {
        f"{path}.{weight}".strip(".") for path, module in model.named_modules() for weight in expert_parameters(module)
    }
    if not held:
        return {}
    conversions = [*layers_of_unsloth(names, model), *get_model_conversion_mapping(model)]
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    own = model.state_dict()
    found: dict[str, set[str]] = {}
    for name in names:
        suffix = next((suffix for suffix in _QUANT_STATES if name.endswith(suffix)), None)
        if suffix is None:
            continue
        part = name.removesuffix(suffix)
        target, _ = rename_source_key(part, renamings, converters, model.base_model_prefix, own)
        for goal in {target, part} & held:
            found.setdefault(goal, set()).add(part)
    return found


def layers_of_unsloth(names: list[str] | None, model: Any) -> list[Any]:
    """Conversions of gpt-oss with a layer for each expert, which transformers does not know, if `names` are such."""
    conversions: list[Any] = []
    for leaf in sorted({name.split(".")[-2] for name in _modules_of_experts(model)} if names else ()):
        for weight in ("gate_up_proj", "down_proj"):
            if not any(f"{leaf}.{weight}s." in name for name in names or ()):
                continue
            turned = [MergeModulelist(dim=0), Transpose(1, 2)]
            conversions += [
                WeightConverter(f"{leaf}.{weight}s.*.weight", f"{leaf}.{weight}", turned),
                WeightConverter(f"{leaf}.{weight}s.*.bias", f"{leaf}.{weight}_bias", [MergeModulelist(dim=0)]),
            ]
    if conversions:
        conversions.append(WeightRenaming(r"router\.linear\.", "router."))
    return conversions


def _modules_of_experts(model: Any) -> list[str]:
    """Names of the weights of experts that are as gpt-oss's: transposed, with biases."""
    return [
        f"{path}.{weight}"
        for path, module in model.named_modules()
        for weight in expert_parameters(module)
        if module.is_transposed and module.has_bias
    ]


class NF4ExpertsMerge(Deserialize):
    """The stored tensors of experts one by one -> the module, packed or dense.

    Args:
        conversion: transformers' own for dense weights.
    """

    def __init__(self, record: LoadRecord, conversion: WeightConverter) -> None:
        super().__init__(record)
        self.conversion = conversion
        # Pattern -> (transformers' pattern of the layer, the tensor beside it). The codes end the name.
        self.parts = {
            layer + (re.escape(suffix) if suffix else "$"): (layer, suffix)
            for layer in conversion._original_source_patterns
            for suffix in STATE_SUFFIXES
        }

    def converter(self) -> WeightConverter:
        """The conversion that takes the place of transformers' own."""
        new = WeightConverter(list(self.parts), list(self.conversion._original_target_patterns), [self])
        for scope in ("scope_prefix", "base_model_prefix"):
            if hasattr(self.conversion, scope):
                setattr(new, scope, getattr(self.conversion, scope))
        return new

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Lists of stored tensors by pattern in; {the parameter's full name: the tensor} out, or nothing if refused."""
        self.record.missing = missing_keys if missing_keys is not None else set()
        name = full_layer_name
        layers: dict[str, dict[str, Any]] = {}
        for pattern, tensors in input_dict.items():
            layer, suffix = self.parts[pattern]
            layers.setdefault(layer, {})[suffix] = tensors
        if all(set(layer) == {""} for layer in layers.values()):
            return self._dense({pattern: layer[""] for pattern, layer in layers.items()}, name, model, **kwargs)
        with self.record.naming(name):
            if name not in self.record.experts:
                raise ValueError("it is packed in the checkpoint, whose config leaves these experts dense")
            experts, leaf = get_module_from_name(model, name)
            fill_experts(experts, leaf, self._packed(layers, experts.stack_sizes[leaf].shape))
            return {name: experts.get_parameter(leaf)}
        return {}

    def _dense(self, layers: dict[str, Any], name: str, model: nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
        if name in self.record.experts:
            self.record.problems[name] = "some of its experts are packed in the checkpoint, and these are not"
            return {}
        done: Any = {layer: [tensor.to(self.dense_dtype) for tensor in tensors] for layer, tensors in layers.items()}
        patterns = {"source_patterns": self.conversion.source_patterns}
        patterns["target_patterns"] = self.conversion.target_patterns
        for operation in self.conversion.operations:
            done = operation.convert(done, **{**kwargs, **patterns}, full_layer_name=name, model=model)
        return {name: only(next(iter(done.values())))}

    def _packed(self, layers: dict[str, dict[str, Any]], shape: torch.Size) -> NF4ExpertsWeight:
        """The stack of `shape`; ValueError says what cannot be made one."""
        along = self._concatenated_along()
        patterns = [layer for layer in self.conversion.source_patterns if layer in layers]
        experts, rows, columns = shape
        if len(patterns) != len(self.conversion.source_patterns):
            absent = sorted(set(self.conversion.source_patterns) - set(patterns))
            raise ValueError(f"the checkpoint lacks {', '.join(absent)} of it")
        if any(".quant_state.bitsandbytes__fp4" in layer for layer in layers.values()):
            raise ValueError("it is packed as fp4, and minipeft reads nf4 only: quantize the original model again")
        if len(patterns) > 1 and along != 1:
            raise ValueError("its layers do not lie one after the other in transformers' stack")
        layers_of = [[read_packed(one) for one in _by_expert(layers[p], p, experts)] for p in patterns]
        matrices = [_side_by_side(parts) if len(parts) > 1 else parts[0] for parts in zip(*layers_of, strict=True)]
        first = matrices[0]
        for e, matrix in enumerate(matrices):
            if tuple(matrix.shape) != (rows, columns):
                raise ValueError(f"expert {e} is {tuple(matrix.shape)}, the module expects {(rows, columns)}")
            if (matrix.blocksize, matrix.nested_blocksize) != (first.blocksize, first.nested_blocksize):
                raise ValueError(f"expert {e} is in blocks of {matrix.blocksize}, expert 0 of {first.blocksize}")
            if not torch.equal(matrix.quant_map, first.quant_map):
                raise ValueError(f"expert {e} has other levels (quant_map) than expert 0")
        double = all(matrix.double_quant for matrix in matrices)
        device = first.codes.device
        stack = NF4ExpertsWeight.zeros(shape, first.dtype, first.blocksize, double, device, first.nested_blocksize)
        stack.quant_map = first.quant_map
        stack.nested_quant_map = first.nested_quant_map if double else None
        for e, matrix in enumerate(matrices):
            stack.put(e, matrix if double else _with_plain_scales(matrix))
        return stack

    def _concatenated_along(self) -> int | None:
        """The dimension of the stacks along which layers lie side by side, if the conversion is of that kind.

        Raises ValueError for another kind.
        """
        operations = list(self.conversion.operations)
        kinds = [type(one) for one in operations]
        if kinds and issubclass(kinds[0], MergeModulelist) and operations[0].dim == 0:
            if len(kinds) == 1 or kinds[1:] == [Transpose]:
                return None
            if kinds[1:] in ([Concatenate], [Concatenated]):
                return int(operations[1].dim)
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"its experts are packed one by one, and transformers puts them together by {names}, which packed weights "
            "cannot go through: quantize the original model instead"
        )


def _by_expert(layer: dict[str, Any], pattern: str, experts: int) -> Iterable[dict[str, torch.Tensor]]:
    """The stored tensors of each expert's layer, as those of one `weight`."""
    for suffix, tensors in layer.items():
        if len(tensors) != experts:
            raise ValueError(f"the checkpoint has {len(tensors)} tensors {pattern}{suffix} for {experts} experts")
    for e in range(experts):
        yield {f"weight{suffix}": tensors[e] for suffix, tensors in layer.items()}


def _side_by_side(parts: tuple[NF4Weight, ...]) -> NF4Weight:
    """The rows of one matrix after those of the other."""
    first = parts[0]
    for part in parts[:-1]:
        n = part.shape.numel()
        if n % part.blocksize or n % 2:
            raise ValueError(
                f"its layers are packed one by one, {tuple(part.shape)} in blocks of {part.blocksize}: the last block "
                "is not full, so they cannot be joined without quantizing again; quantize the original model instead"
            )
    if len({(part.blocksize, part.shape[1]) for part in parts}) > 1:
        raise ValueError(f"its layers do not fit each other: {[(tuple(p.shape), p.blocksize) for p in parts]}")
    plain = [_with_plain_scales(part) for part in parts]
    return replace(
        plain[0],
        codes=torch.cat([part.codes for part in plain]),
        absmax=torch.cat([part.absmax for part in plain]),
        shape=torch.Size((sum(part.shape[0] for part in parts), first.shape[1])),
    )


def _with_plain_scales(w: NF4Weight) -> NF4Weight:
    """The same weight, value by value, with its scales in float32."""
    if not w.double_quant:
        return w
    return replace(w, absmax=w.scales(), nested_absmax=None, nested_quant_map=None, offset=None)


def for_packed(conversion: Any, targets: Iterable[str], record: LoadRecord) -> Any:
    """`conversion`, or for one that makes some of `targets`, packed weights of experts, one that takes them packed."""
    operations: Any = getattr(conversion, "operations", ())
    if not operations or any(isinstance(one, Deserialize) for one in operations):
        return conversion
    back = copy.copy(conversion).reverse_transform()
    if not any(back.rename_source_key(target)[1] is not None for target in targets):
        return conversion
    return NF4ExpertsMerge(record, conversion).converter()

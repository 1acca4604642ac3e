"""One weight on its way from a checkpoint into a model: quantized, or taken in its packed form.

transformers hands each weight (and the scale tensors of a packed one) to a `ConversionOps` as it comes from
disk and drops it afterwards; so no more than one dense weight exists at a time. An exception here would come
out as a generic RuntimeError, with the cause in a log line. So problems are collected by name, and the
quantizer raises them when loading is over.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from minipeft.nf4.experts import STATE_SUFFIXES, NF4Experts
from minipeft.nf4.format import parse_entries
from minipeft.nf4.hf.modules import dense_experts, dense_weight, nf4_linears
from minipeft.nf4.linear import NF4Linear
from minipeft.nf4.stack import NF4ExpertsWeight
from minipeft.nf4.weight import NF4Weight

# The names under which bitsandbytes stores one weight. Longest first: patterns are tried in this order.
PACKED_NAMES = (
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight.nested_quant_map",
    "weight.nested_absmax",
    "weight.quant_map",
    "weight.absmax",
    "weight",
)


@dataclass
class LoadRecord:
    """The fates of the weights of one `from_pretrained` call."""

    # the names of experts' weights that are to be packed; those of linear layers are told by their modules
    experts: set[str] = field(default_factory=set)
    filled: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)
    # transformers' own set, which it keeps up to date; read when loading is over
    missing: set[str] = field(default_factory=set)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Note a ValueError or TypeError under the tensor's name instead of letting it out."""
        try:
            yield
        except (ValueError, TypeError) as error:
            self.problems[name] = str(error)
        else:
            self.filled.add(name)

    def raise_problems(self, model: nn.Module) -> None:
        """Raise unless every NF4Linear and every packed expert has its weight and its bias from the checkpoint.

        Raises:
            ValueError: names each tensor that is missing or was refused, and why.
        """
        absent = "it is not in the checkpoint (a new module can stay dense: name it in skip_modules)"
        for name, linear in nf4_linears(model):
            if f"{name}.weight" not in self.filled:
                self.problems.setdefault(f"{name}.weight", absent)
            if linear.bias is not None and f"{name}.bias" in self.missing:
                self.problems[f"{name}.bias"] = absent
        beside = {name.rpartition(".")[0] for name in self.experts}
        missing = {name for name in self.missing if name.rpartition(".")[0] in beside}  # biases, perhaps
        for name in (self.experts | missing) - self.filled:
            self.problems.setdefault(name, absent)
        if self.problems:
            lines = "".join(f"\n  {name}: {why}" for name, why in sorted(self.problems.items()))
            raise ValueError(f"{type(model).__name__}: these tensors cannot be loaded in NF4:{lines}")


def fill(linear: NF4Linear, weight: NF4Weight) -> None:
    """Give a meta-device `NF4Linear` its weight, in the dtype that the model is loaded in.

    transformers must not initialize it again.
    """
    linear.set_weight(replace(weight, dtype=linear.weight_dtype))
    linear._is_hf_initialized = True  # type: ignore[assignment]


def fill_experts(experts: NF4Experts, name: str, weight: NF4ExpertsWeight) -> None:
    """As `fill`, for the weights `name` of a module of experts."""
    experts.set_stack(name, weight)
    parameter = experts.get_parameter(name)
    scales = [buffer for buffer_name, buffer in experts._buffers.items() if buffer_name.startswith(f"{name}_")]
    for tensor in (parameter, *scales):
        if tensor is not None:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]


class NF4Quantize(ConversionOps):
    """A dense weight from disk -> the packed weight and its scales, in the module."""

    def __init__(self, record: LoadRecord, blocksize: int, double_quant: bool) -> None:
        self.record, self.blocksize, self.double_quant = record, blocksize, double_quant

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Full names and weights in, the same names out: packed where the module is to be."""
        self.record.missing = missing_keys if missing_keys is not None else set()
        result: dict[str, torch.Tensor] = {}
        for name in list(input_dict):
            value = only(input_dict.pop(name))
            module, leaf = get_module_from_name(model, name)
            if name in self.record.experts:
                with self.record.naming(name):
                    dense = dense_experts(module, leaf, value)
                    fill_experts(module, leaf, NF4ExpertsWeight.quantize(dense, self.blocksize, self.double_quant))
                    result[name] = module.get_parameter(leaf)
            elif isinstance(module, NF4Linear) and leaf == "weight":
                with self.record.naming(name):
                    dense = dense_weight(module, value)
                    fill(module, NF4Weight.quantize(dense, self.blocksize, self.double_quant))
                    result[name] = module.weight
            else:
                result[name] = value
        return result


class Deserialize(ConversionOps):
    """The base of the operations that take stored tensors, packed or dense, as they are."""

    def __init__(self, record: LoadRecord) -> None:
        self.record = record
        # set by the quantizer for each weight: the dtype a dense one is wanted in
        self.dense_dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Deserialize:
        # transformers copies the operation for every tensor; the record must stay the one
        new = copy.copy(self)
        new.dense_dtype = None
        return new

    def dense(self, stored: dict[str, torch.Tensor], key: str, name: str) -> dict[str, torch.Tensor]:
        """{key: the weight `name`}, of a module that is dense; nothing if it is stored packed."""
        if set(stored) != {key}:
            self.record.problems[name] = (
                "it is packed in the checkpoint, but the checkpoint's config leaves this module dense "
                "(llm_int8_skip_modules in config.json)"
            )
            return {}
        weight = stored[key]
        return {key: weight.to(self.dense_dtype) if weight.is_floating_point() else weight}


class NF4Deserialize(Deserialize):
    """The stored tensors of one weight by the names of `PACKED_NAMES` -> the module."""

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Stored names (relative to the module) and tensors in; {"weight": ...} out, or nothing if refused."""
        self.record.missing = missing_keys if missing_keys is not None else set()
        stored = {name: only(value) for name, value in input_dict.items()}
        linear, leaf = get_module_from_name(model, full_layer_name)
        if not isinstance(linear, NF4Linear) or leaf != "weight":
            return self.dense(stored, "weight", full_layer_name)
        with self.record.naming(full_layer_name):
            fill(linear, _packed(stored, linear))
            return {"weight": linear.weight}
        return {}


class NF4ExpertsDeserialize(Deserialize):
    """The stored tensors of the stacked weights of experts -> the module.

    Args:
        leaf: the end of such weights' names, the experts' module and its parameter: "experts.down_proj".
    """

    def __init__(self, record: LoadRecord, leaf: str) -> None:
        super().__init__(record)
        # The last pattern is the codes', and of dense weights: the end of the name, so that `down_proj.bias` is not it.
        self.suffixes = {re.escape(leaf + suffix) + ("" if suffix else "$"): suffix for suffix in STATE_SUFFIXES}

    @property
    def patterns(self) -> list[str]:
        """Patterns that match the names in the checkpoint."""
        return list(self.suffixes)

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Stored names, as patterns, and tensors in; {the parameter's full name: codes} out, or nothing if refused."""
        self.record.missing = missing_keys if missing_keys is not None else set()
        name = full_layer_name
        stored = {name + self.suffixes[pattern]: only(value) for pattern, value in input_dict.items()}
        if name not in self.record.experts:
            return self.dense(stored, name, name)
        experts, leaf = get_module_from_name(model, name)
        with self.record.naming(name):
            if set(stored) == {name} and stored[name].dim() == 3:
                raise ValueError(
                    "it is dense in the checkpoint, but the checkpoint's config says packed (set experts to false, or "
                    "add the module to llm_int8_skip_modules, in config.json)"
                )
            weight = NF4ExpertsWeight.from_state(stored, name)
            _check_finite(weight)
            fill_experts(experts, leaf, weight)
            return {name: experts.get_parameter(leaf)}
        return {}


def _packed(stored: dict[str, torch.Tensor], linear: NF4Linear) -> NF4Weight:
    """The stored tensors of the packed weight of `linear` as an `NF4Weight`; ValueError names what is wrong."""
    expected = (linear.out_features, linear.in_features)
    if set(stored) == {"weight"} and tuple(stored["weight"].shape) == expected:
        raise ValueError(
            "it is dense in the checkpoint, but the checkpoint's config says packed "
            "(add the module to llm_int8_skip_modules in config.json)"
        )
    weight = read_packed(stored)
    if tuple(weight.shape) != expected:
        raise ValueError(f"the packed weight is {tuple(weight.shape)}, the module expects {expected}")
    return weight


def read_packed(stored: dict[str, torch.Tensor]) -> NF4Weight:
    """The stored tensors of one packed weight, called "weight", as an `NF4Weight`; ValueError names what is wrong."""
    if "weight.quant_state.bitsandbytes__fp4" in stored:
        raise ValueError("it is packed as fp4, and minipeft reads nf4 only: quantize the original model again")
    needed = {"weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"}
    absent = sorted(needed - set(stored))
    if absent:
        raise ValueError(f"the checkpoint lacks {', '.join(absent)} of it")
    weight = NF4Weight.from_state(_with_float32_scales(stored))
    _check_finite(weight)
    return weight


def _check_finite(weight: NF4Weight) -> None:
    """Scales come from finite weights: NaN or infinity in them is damage, and would spread from here."""
    scales = {
        "weight.absmax": weight.absmax,
        "weight.quant_map": weight.quant_map,
        "weight.nested_absmax": weight.nested_absmax,
        "weight.nested_quant_map": weight.nested_quant_map,
        "nested_offset": weight.offset,
    }
    for name, scale in scales.items():
        if scale is not None and not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{name} holds NaN or infinity")


def _with_float32_scales(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weight with plain scales, if its doubly quantized ones are to be computed in 16 bits.

    bitsandbytes writes such weights ("nested_dtype": "bfloat16") when it saves a bfloat16 model that has run on a
    CPU with AVX512-BF16, where it repacks the weight, and rounds the scale after each of the two steps when it
    reads them. The rounded results are taken as single quantization. (bitsandbytes 0.50.2, functional.py,
    `_convert_weight_packed_for_cpu_inverse`, and tried.)
    """
    quant_state = stored[PACKED_NAMES[0]]
    try:
        entries = parse_entries(quant_state, PACKED_NAMES[0])
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(entries.get("nested_dtype"))
    except (ValueError, TypeError, AttributeError):
        return stored  # the reader has the better words for it
    nested = {"weight.absmax", "weight.nested_absmax", "weight.nested_quant_map"}
    if dtype is None or not nested <= set(stored):
        return stored
    codes, nested_map = stored["weight.absmax"], stored["weight.nested_quant_map"]
    nested_absmax = stored["weight.nested_absmax"].repeat_interleave(entries["nested_blocksize"])[: codes.numel()]
    absmax = (nested_map[codes.int()] * nested_absmax).to(dtype) + entries["nested_offset"]
    plain = {k: v for k, v in entries.items() if not k.startswith("nested_")}
    packed = torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)
    kept = {name: t for name, t in stored.items() if name not in nested}
    return {**kept, "weight.absmax": absmax.float(), PACKED_NAMES[0]: packed.to(codes.device)}


def only(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The tensor, alone or in a list of one."""
    return value[0] if isinstance(value, list) else value

"""The transformers quantizer for NF4: what `from_pretrained` calls around loading the weights.

Order of calls (transformers 5.23, modeling_utils.from_pretrained): the model is built on the meta device;
`_process_model_before_weight_loading` swaps linear layers for empty `NF4Linear`s; each weight goes through an
operation of `load.py`; `_process_model_after_weight_loading` checks that nothing is missing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from minipeft.base_state import one_dtype
from minipeft.compat import changes_conversions
from minipeft.nf4.dense import keep_dense, make_plain
from minipeft.nf4.experts import pack_weights, start_packing
from minipeft.nf4.hf.config import NF4Config
from minipeft.nf4.hf.load import (
    PACKED_NAMES,
    Deserialize,
    LoadRecord,
    NF4Deserialize,
    NF4ExpertsDeserialize,
    NF4Quantize,
)
from minipeft.nf4.hf.merging import without_copies
from minipeft.nf4.hf.model import mark, unmark
from minipeft.nf4.hf.modules import (
    convertible_experts,
    modules_to_skip,
    names_by_module,
    nf4_experts,
    nf4_linear_like,
    nf4_linears,
    packed_names,
    require_convertible,
    skip_modules_for_file,
    warn_of_dense_experts,
)
from minipeft.nf4.hf.mxfp4 import mxfp4_conversions
from minipeft.nf4.hf.one_by_one import for_packed, layers_of_unsloth, names_for, packed_in
from minipeft.nf4.linear import NF4Linear


class NF4HfQuantizer(HfQuantizer):
    """Loads, saves and dequantizes NF4 models; the model keeps it as `model.hf_quantizer`."""

    requires_calibration = False
    quantization_config: NF4Config
    # set on the instance once a minipeft adapter is on the model: before that there is nothing to train
    _minipeft_attached = False

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        # the skip list may be completed for the model at hand, and the caller's object serves other models too
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.record = LoadRecord()
        self.hooks: list[RemovableHandle] = []
        # Of a packed checkpoint: the experts' weights that are packed one by one, and conversions of unsloth's names.
        self.one_by_one: set[str] = set()
        self.unsloths: list[Any] = []
        # Of a checkpoint in MXFP4.
        self.mxfp4: list[Any] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ValueError for a device_map with "disk"."""
        if isinstance(device_map, dict) and "disk" in {str(place) for place in device_map.values()}:
            raise ValueError("NF4 models cannot be offloaded to disk: remove 'disk' from device_map")

    def update_device_map(self, device_map: Any) -> Any:
        """The map, or for None the current accelerator, if there is one: as bitsandbytes."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes of a packed weight's element, for device maps; a packed checkpoint has its own sizes already: None."""
        return None if self.pre_quantized else 0.5

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """The memory that the model may take: room is left for the one dense weight that is being quantized."""
        return {device: size if isinstance(size, str) else int(size * 0.9) for device, size in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """True for the weight of an NF4Linear, and for those of experts that are packed."""
        module, name = get_module_from_name(model, param_name)
        return (isinstance(module, NF4Linear) and name == "weight") or param_name in self.record.experts

    def get_quantize_ops(self) -> NF4Quantize:
        """transformers asks for the conversion of a dense weight: the one that packs it."""
        config = self.quantization_config
        return NF4Quantize(self.record, config.blocksize, config.double_quant)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """For a packed checkpoint: gather the stored tensors of each weight and hand them to `Deserialize`."""
        if not self.pre_quantized:
            return [] if changes_conversions(HfQuantizer) else self.mxfp4
        own = [] if changes_conversions(HfQuantizer) else self._experts_conversions()
        return [*own, WeightConverter(list(PACKED_NAMES), "weight", [NF4Deserialize(self.record)])]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """The conversions of names and tensors: those of packed experts before the model's own, which are for dense."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        if not self.pre_quantized:
            return [*self.mxfp4, *map(without_copies, conversions)]
        own = self._experts_conversions()
        return own + [for_packed(one, self.one_by_one, self.record) for one in (*self.unsloths, *conversions)]

    def _experts_conversions(self) -> list[WeightConverter]:
        stacked = self.record.experts - self.one_by_one
        leaves = sorted({".".join(name.split(".")[-2:]) for name in stacked})
        operations = {leaf: NF4ExpertsDeserialize(self.record, leaf) for leaf in leaves}
        return [WeightConverter(operation.patterns, leaf, [operation]) for leaf, operation in operations.items()]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None (leave as stored) for what goes through our operation: scales must stay float32.

        A dense weight goes through it too; the dtype it is wanted in is noted for the operation.
        """
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Deserialize):
                operation.dense_dtype = dtype
                return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        with_experts = not self.pre_quantized if config.experts is None else config.experts
        skip = modules_to_skip(model, config.skip_modules, self.pre_quantized)
        of_experts = convertible_experts(model, skip) if with_experts else []
        if self.pre_quantized:
            of_experts = self._find_packed_experts(model, kwargs.get("checkpoint_files"), of_experts)
        groups = require_convertible(model, skip, of_experts)
        if not self.pre_quantized:
            self.mxfp4 = mxfp4_conversions(names_for(model, kwargs.get("checkpoint_files")), model, self.record)
            config.skip_modules = skip_modules_for_file(model, config.skip_modules)
            config.experts = True if of_experts else config.experts
            if with_experts:
                warn_of_dense_experts(model)
        for group in groups:
            dense = model.get_submodule(group[0])
            linear = nf4_linear_like(dense, config)
            if not self.pre_quantized:
                # transformers before 5.23 casts what it reads to the dtype it finds here, and uint8 would ruin it
                linear.weight = dense.weight
            self.hooks.append(linear.register_state_dict_post_hook(_hide_scales))
            for name in group:
                model.set_submodule(name, linear)
        for name, weights in of_experts:
            experts = start_packing(model.get_submodule(name), config.compute_dtype)
            for weight in weights if self.pre_quantized else ():
                pack_weights(experts, weight, config.blocksize, config.double_quant)
            # What is missing is refused by name: transformers has no values to start packed experts from.
            experts._is_hf_initialized = True  # type: ignore[assignment]
            self.record.experts.update(f"{name}.{weight}" for weight in weights)
            self.hooks.append(experts.register_state_dict_post_hook(_hide_scales))
        keep_dense(model)

    def _find_packed_experts(
        self, model: PreTrainedModel, files: Any, expected: list[tuple[str, list[str]]]
    ) -> list[tuple[str, list[str]]]:
        """The experts that a packed checkpoint holds packed, told by its names where its config does not say.

        Raises ValueError for packed experts that the config says are dense, or that this transformers cannot gather.
        """
        names = names_for(model, files)
        packed = packed_in(names, model) if names is not None else {}
        if packed and self.quantization_config.experts is False:
            raise ValueError(
                f"{sorted(packed)[0]} is packed in the checkpoint, but the checkpoint's config leaves experts dense "
                "(experts in config.json)"
            )
        self.one_by_one = {goal for goal, parts in packed.items() if any(part.endswith(".weight") for part in parts)}
        if self.one_by_one and not changes_conversions(HfQuantizer):
            raise ValueError(f"{sorted(self.one_by_one)[0]} is packed one by one: a newer transformers can read it")
        self.unsloths = layers_of_unsloth(names, model)
        if self.quantization_config.experts:
            return expected
        return [(path, weights) for path, weights in _by_module(packed).items()]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.record.raise_problems(model)
        self.record = LoadRecord()
        while self.hooks:
            self.hooks.pop().remove()
        if self.unsloths:  # such a model is saved under transformers' own names
            used: list[Any] = getattr(model, "_weight_conversions", [])
            model._weight_conversions = [one for one in used if all(one is not own for own in self.unsloths)]
        _drop_conversions_of_packed_weights(model)
        mark(model)
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Take from `model` what says that it is quantized."""
        unmark(model)
        super().remove_quantization_config(model)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Put dense layers in the places of the packed ones.

        Args:
            dtype: Of the whole model; None for that of the rest of it, or for each layer's own where the rest has
                several. transformers would take that of the config, which knows of no casts.
        """
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        _refuse_adapters(model)
        target = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        target = target or one_dtype(model)
        for group in names_by_module(model, NF4Linear):
            dense = model.get_submodule(group[0]).to_dense(target)
            for name in group:
                model.set_submodule(name, dense)
        for _, experts in list(nf4_experts(model)):
            experts.to_dense(target)
        make_plain(model, target)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: `save_pretrained` writes the packed weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters train over the packed weights, as transformers asks here."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True once an adapter is attached: Trainer refuses a quantized model while nothing in it can be trained."""
        return self._minipeft_attached


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in (*nf4_linears(model), *nf4_experts(model)):
        adapter_names: Any = getattr(module, "adapter_names", set)  # of an adapted layer
        if adapters := adapter_names():
            raise ValueError(
                f"{name} has adapters {sorted(adapters)}, which dequantize() would lose: merge_and_unload() "
                "dequantizes and keeps what they do, unload() removes them"
            )


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of parameters by that of their module."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        path, _, leaf = name.rpartition(".")
        found.setdefault(path, []).append(leaf)
    return found


def _hide_scales(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """While loading, one NF4 weight is one name to transformers; its scales come with it."""
    weights = ("weight",) if isinstance(module, NF4Linear) else tuple(module.stack_sizes)
    for name in [name for name in state if name.startswith(tuple(f"{prefix}{weight}." for weight in weights))]:
        del state[name]


def _drop_conversions_of_packed_weights(model: PreTrainedModel) -> None:
    """Keep `save_pretrained` from undoing, on packed weights, conversions made for dense ones.

    Saving reverses what loading did to the names and shapes. Ours needs no reversal (the module's state has the
    stored names), and one that splits or merges weights would cut the packed bytes at the wrong place: such a
    model is saved under its own names, which loading takes as well.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # a model that was not loaded: saving would take the conversions of its architecture
        every = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in every if not isinstance(conversion, PrefixChange)]
    packed = packed_names(model)
    stacks = [f"{path}.{name}" for path, experts in nf4_experts(model) for name in experts.packed_names()]

    def touches_packed(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            # A stack's own name is what its scales are stored beside: a layer's in its place would not be found.
            back = conversion.reverse_transform()
            renamed = ((name, back.rename_source_key(name)[0]) for name in stacks)
            return any(old.rpartition(".")[2] != new.rpartition(".")[2] for old, new in renamed)
        if any(isinstance(operation, Deserialize) for operation in conversion.operations):
            return True
        back = conversion.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in packed)

    kept = [conversion for conversion in conversions if not touches_packed(conversion)]
    if len(kept) < len(conversions):
        model._weight_conversions = kept

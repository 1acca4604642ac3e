"""NF4 in Hugging Face transformers: load in 4 bits, save, read bitsandbytes' checkpoints, quantize in memory.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4Config())   # from a dense checkpoint
    model.save_pretrained(folder)                # packed; bitsandbytes can read it too, but for packed experts
    model = AutoModelForCausalLM.from_pretrained(folder)         # packed as it is, also if bitsandbytes wrote it
    model = quantize_model(model, NF4Config())                   # a model that is in memory already

A GGUF file is read by transformers, dequantized, and then goes through `quantize_model`:
`from_pretrained(folder, gguf_file=f, quantization_config=GgufConfig(gguf_file=f, dequantize=True))`.

Importing this module registers the quantizer, and makes transformers read 4-bit bitsandbytes checkpoints with
it, so that no bitsandbytes is needed; `read_bitsandbytes_with("transformers")` hands them back. (A
`transformers.BitsAndBytesConfig` that quantizes a dense checkpoint still goes to bitsandbytes.) The files:
`config.py` configuration, `modules.py` which modules, `load.py` one weight, `merging.py`, `one_by_one.py` and
`mxfp4.py` other layouts of experts, `model.py` what the model answers, `quantizer.py` the rest.
"""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig as _TransformersBitsAndBytesConfig
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from minipeft.nf4.dense import keep_dense
from minipeft.nf4.experts import pack_weights, start_packing
from minipeft.nf4.hf.config import METHOD, BitsAndBytesConfig, NF4Config
from minipeft.nf4.hf.modules import (
    convertible_experts,
    dense_weight,
    modules_to_skip,
    nf4_linear_like,
    packed_names,
    require_convertible,
    skip_modules_for_file,
    warn_of_dense_experts,
)
from minipeft.nf4.hf.quantizer import NF4HfQuantizer
from minipeft.nf4.linear import NF4Linear
from minipeft.nf4.weight import NF4Weight

__all__ = ["BitsAndBytesConfig", "NF4Config", "NF4HfQuantizer", "quantize_model", "read_bitsandbytes_with"]

Model = TypeVar("Model", bound=nn.Module)


def read_bitsandbytes_with(library: Literal["minipeft", "transformers"]) -> None:
    """Choose who reads checkpoints whose config.json says 4-bit bitsandbytes: this process, from now on.

    "minipeft" (the choice that importing this module makes) needs no bitsandbytes; "transformers" uses
    bitsandbytes, and is what an explicit `transformers.BitsAndBytesConfig` for such a checkpoint needs.

    Raises:
        ValueError: another name.
    """
    readers = {"minipeft": NF4Config, "transformers": _TransformersBitsAndBytesConfig}
    if library not in readers:
        raise ValueError(f"library is {library!r}; expected 'minipeft' or 'transformers'")
    AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit"] = readers[library]


def quantize_model(model: Model, config: NF4Config | None = None) -> Model:
    """Put the linear layers and experts of a model in memory into NF4, in place; each dense weight is freed.

    The packed bytes are those `from_pretrained(..., quantization_config=config)` gives. A transformers model can
    afterwards be saved, reloaded and dequantized as if it had been loaded so. Any other module works too: all of
    its `nn.Linear`s are converted, except those in `config.skip_modules` and those that share their weight. Of a
    mixture's experts, whose weights are one 3-D parameter, each expert's matrix is packed by itself.

    Args:
        model: weights float32, bfloat16 or float16, on any device; they stay on it.
        config: `NF4Config()` if None.

    Returns:
        The same object.

    Raises:
        ValueError: the model is quantized or has adapters already, has no linear layer, or a weight is not finite, or
            a module of experts has a patched forward (names the module). The model is unchanged then.
        TypeError: `config` is something else, or a weight has another dtype.
    """
    config = NF4Config() if config is None else config
    _check_quantizable(model, config)
    with_experts = config.experts is not False
    skip = modules_to_skip(model, config.skip_modules)
    of_experts = convertible_experts(model, skip) if with_experts else []
    groups = require_convertible(model, skip, of_experts)
    for group in groups:
        _check_weight(group[0], "weight", model.get_submodule(group[0]))
    for name, weights in of_experts:
        if "forward" in vars(model.get_submodule(name)):
            raise ValueError(
                f"{name} has a forward of its own, a patch that reads the dense weights: quantize the model before it "
                "is patched, or leave the module dense by skip_modules"
            )
        for weight in weights:
            _check_weight(name, weight, model.get_submodule(name))
    if with_experts:
        warn_of_dense_experts(model)
    file_config = copy.deepcopy(config)
    file_config.experts = True if of_experts else config.experts
    file_config.skip_modules = skip_modules_for_file(model, config.skip_modules)
    for group in groups:
        linear = _pack(model.get_submodule(group[0]), config)
        for name in group:
            model.set_submodule(name, linear)
    for name, weights in of_experts:
        experts = start_packing(model.get_submodule(name), config.compute_dtype)
        for weight in weights:
            pack_weights(experts, weight, config.blocksize, config.double_quant)
    keep_dense(model)
    if isinstance(model, PreTrainedModel):
        _mark_as_loaded(model, file_config)
    return model


def _check_quantizable(model: nn.Module, config: NF4Config) -> None:
    if not isinstance(config, NF4Config):
        raise TypeError(f"quantize_model takes an NF4Config, not {type(config).__name__}")
    name = type(model).__name__
    if getattr(model, "is_quantized", False) or packed_names(model):
        raise ValueError(f"{name} is quantized already: load the original weights, or call model.dequantize() first")
    if getattr(model, "peft_config", None):
        raise ValueError(f"{name} has adapters: quantize the model first and attach them afterwards")
    if type(model) is nn.Linear:
        raise ValueError("quantize_model replaces the layers inside a model; for one layer use NF4Linear.from_linear")


def _check_weight(name: str, leaf: str, module: nn.Module) -> None:
    """Refuse what cannot be packed before anything is changed."""
    weight = module.get_parameter(leaf)
    if hasattr(module, "_hf_hook"):
        raise ValueError(f"{name} is spread over devices: load the model with quantization_config=NF4Config() instead")
    if weight.is_meta:
        raise ValueError(f"{name}.{leaf} is on the meta device: load the model before quantizing it")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}.{leaf} is {weight.dtype}; NF4 takes float32, bfloat16 or float16")
    # aminmax carries NaN and infinity through, and allocates nothing of the weight's size
    if weight.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(weight.detach())):
        raise ValueError(f"{name}.{leaf} holds NaN or infinity: NF4 can hold finite weights only")


def _pack(module: nn.Module, config: NF4Config) -> NF4Linear:
    linear = nf4_linear_like(module, config)
    assert isinstance(module.weight, torch.Tensor)
    dense = dense_weight(linear, module.weight)
    linear.set_weight(NF4Weight.quantize(dense, config.blocksize, config.double_quant))
    linear.bias = module.bias  # type: ignore[assignment]
    return linear


def _mark_as_loaded(model: PreTrainedModel, config: NF4Config) -> None:
    """Leave on a transformers model what `from_pretrained` leaves on a quantized one."""
    quantizer = NF4HfQuantizer(config, pre_quantized=False)
    quantizer.record.filled.update(packed_names(model))
    model.is_quantized = True
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


register_quantization_config(METHOD)(NF4Config)
register_quantizer(METHOD)(NF4HfQuantizer)
read_bitsandbytes_with("minipeft")

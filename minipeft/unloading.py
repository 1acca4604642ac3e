"""From an adapted model back to a plain one: what becomes of 4-bit layers and of tied embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minipeft.attach import adapter_modules
from minipeft.lora.layers import LoraNF4Linear
from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft.nf4.dense import make_plain


def requantize_merged(model: nn.Module) -> None:
    """Quantize every merged 4-bit layer's dense weight to NF4 again, as its old weight was."""
    for _, module in adapter_modules(model):
        if isinstance(module, LoraNF4Linear) and module.dense_merged is not None:
            old = module.nf4_weight()
            dense = module.dense_merged
            module.dense_merged = None
            module.set_weight(NF4Weight.quantize(dense, old.blocksize, old.double_quant))


def detach_adapters(model: nn.Module) -> None:
    """Make every adapted module of `model` plain again; merged weights stay merged, a 4-bit layer's as a dense one."""
    from minipeft.nf4.hf.modules import to_dense

    for path, module in list(adapter_modules(model)):
        dense = module.dense_merged if isinstance(module, LoraNF4Linear) else None
        module.detach()
        if dense is not None:
            model.set_submodule(path, to_dense(module, None, dense).requires_grad_(False))  # type: ignore[arg-type]


def dequantize_rest(model: Any) -> None:
    """Make what is still NF4 dense, in the dtype it was quantized from, and `model` a plain one for transformers."""
    from minipeft.nf4.hf.modules import to_dense

    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(path, to_dense(module, None).requires_grad_(False))
    make_plain(model)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


def untie_what_differs(model: Any) -> None:
    """If merging or a trained copy gave one of two tied embeddings its own weight, say so in the config.

    Otherwise saving would drop one of them and loading would tie them again.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return
    first, second = model.get_input_embeddings(), model.get_output_embeddings()
    if first is None or second is None or not getattr(config, "tie_word_embeddings", False):
        return
    if first.weight is not second.weight:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first linear layer's weight."""
    return next(module.weight.dtype for module in model.modules() if isinstance(module, nn.Linear))

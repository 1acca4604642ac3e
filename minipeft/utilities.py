"""PEFT's small functions over models and tensors, for the scripts and integrations that import them."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.attach import adapter_modules, set_trainable, switch_of, unmerge
from minipeft.mixins import behind_face

# What `target_modules` says for all linear layers but the head.
ALL_LINEAR = "all-linear"

# Adapters of a model that has no verbs of its own (`inject_adapter_in_model`); of one that has, the verbs do the same.


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make this adapter, or these together, act and get gradients, and no other. Merged adapters are unmerged.

    Args:
        inference_mode: Turn all adapters' gradients off.
        layer_cls: Of PEFT's; the adapters of all methods are switched together here.

    Raises ValueError for an adapter that the model does not have.
    """
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    _check_names(model, names)
    unmerge(model)
    switch_of(model).active = names
    for _, module in adapter_modules(model):
        module.follow(active=True)
    set_trainable(model, names, not inference_mode, others=False)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str] | None:
    """Remove an adapter's tensors. Merged adapters are unmerged.

    Args:
        prefix, layer_cls: Of PEFT's, for finding the tensors, which know themselves here.

    Returns: the adapters that act now, if there are any; if it was the only one to act, the first of the others acts.

    Raises ValueError for an adapter that the model does not have.
    """
    _check_names(model, (adapter_name,))
    unmerge(model)
    switch = switch_of(model)
    for _, module in adapter_modules(model):
        behind_face(module).delete_adapter(adapter_name)
        module.follow(active=adapter_name in module.switch.active)
    left = tuple(name for name in switch.active if name != adapter_name)
    switch.active = left or tuple(_names_of(model)[:1])
    if not left:
        set_trainable(model, switch.active, True)
    return list(switch.active) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Turn the gradients of one or several adapters on or off.

    Raises ValueError for an adapter that the model does not have.
    """
    names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
    _check_names(model, names)
    set_trainable(model, names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn the 16-bit tensors of an adapter into float32, in place; nothing happens without `autocast_adapter_dtype`.

    Raises ValueError for an adapter that the model does not have.
    """
    _check_names(model, (adapter_name,))
    for _, module in adapter_modules(model) if autocast_adapter_dtype else ():
        for tensor in module.adapter_state(adapter_name).values():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Turn the gradients of an adapter off."""
    set_requires_grad(model, adapter_name, False)


_set_adapter = set_adapter


def _names_of(model: nn.Module) -> list[str]:
    found = {name: None for _, module in adapter_modules(model) for name in sorted(module.adapter_names())}
    order = getattr(model, "peft_config", None) or {}
    return [*(name for name in order if name in found), *(name for name in found if name not in order)]


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    known = _names_of(model)
    for name in names:
        if name not in known:
            raise ValueError(f"there is no adapter called {name!r}; there are {sorted(known)}")


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn trained parameters into float32 and frozen ones into `dtype` (float16 or bfloat16), in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The policy by which FSDP wraps a model with adapters: whole blocks, and what is trained inside on its own.

    Blocks are of the classes that the variable FSDP_TRANSFORMER_CLS_TO_WRAP names, separated by commas; by default
    those that the model itself says not to split.

    Raises ValueError for a class that the model does not have.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    wanted = {name for name in (named.split(",") if named else _get_no_split_modules(model)) if name}
    classes = set()
    for name in sorted(wanted):
        found = {type(module) for module in model.modules() if name in (base.__name__ for base in type(module).__mro__)}
        if not found:
            raise ValueError(f"FSDP_TRANSFORMER_CLS_TO_WRAP: the model has no module of class {name!r}")
        classes |= found
    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trained_leaf),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes),
        ],
    )


def _is_trained_leaf(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not list(module.children()) and bool(own) and all(parameter.requires_grad for parameter in own)


def _get_no_split_modules(model: nn.Module) -> set[str]:
    """The names of the classes that a transformers model, and the models inside it, say not to split."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


# Modules, names and tensors.


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(the parent of the module called `key`, the module, the last part of its name)."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of `pattern_keys` (of `rank_pattern`, `alpha_pattern`) that the name ends with, or the name itself."""
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The number of rows of the one that is given. Raises ValueError for neither."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """(batch, tokens) labels -> (batch, tokens) decoder inputs: one token later, -100 replaced by `pad_token_id`.

    Raises ValueError without a `pad_token_id`.
    """
    if pad_token_id is None:
        raise ValueError("shift_tokens_right needs a pad_token_id; the model's config has none")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat((start, input_ids[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """`weight`, transposed if it lies (in_features, out_features)."""
    return weight.T if fan_in_fan_out else weight


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """(device, address, size in bytes) of the memory of `tensor`: equal for tensors that share it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def infer_device() -> str:
    """The kind of device that there is to run on: "cuda", "mps", "xpu" or "cpu"."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"


def str_to_bool(value: str) -> int:
    """1 for y, yes, t, true, on, 1 and 0 for their opposites. Raises ValueError for other strings."""
    if value.lower() in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if value.lower() in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"expected a word for true or false, got {value!r}")


# PEFT's questions if a package is installed.


def _installed(package: str) -> Callable[[], bool]:
    def is_available() -> bool:
        return importlib.util.find_spec(package) is not None

    is_available.__doc__ = f"True if the package `{package}` is installed."
    return is_available


is_aqlm_available = _installed("aqlm")
is_bnb_available = is_bnb_4bit_available = _installed("bitsandbytes")
is_diffusers_available = _installed("diffusers")
is_eetq_available = _installed("eetq")
is_gptqmodel_available = _installed("gptqmodel")
is_hqq_available = _installed("hqq")
is_optimum_available = _installed("optimum")
is_torchao_available = _installed("torchao")


def is_xpu_available() -> bool:
    """True if there is an Intel GPU."""
    return torch.xpu.is_available()

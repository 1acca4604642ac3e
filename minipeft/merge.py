"""Folding adapters into the base weights and out again, and giving back the plain model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minipeft.adapter import AdaptedModel, AdapterModule
from minipeft.attach import adapter_modules, config_of, unmerge
from minipeft.base_state import one_dtype
from minipeft.dispatched import follow_class, in_memory
from minipeft.embeddings import untie_different_embeddings
from minipeft.errors import NotMergeableError
from minipeft.gathered import check_shared, share_out
from minipeft.meta import recall_adapters
from minipeft.mixins import Face, mix_out
from minipeft.packed import Packed
from minipeft.preparing import tell_quantizer

logger = logging.getLogger("minipeft")


def merge(model: AdaptedModel, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
    """Fold adapters (by default those that act, in each module) into the base weights; the output stays the same.

    Adapters that are merged already stay merged; a warning says so. The sum is made in float32 and the original weights
    are kept, so unmerging is exact.

    Args:
        safe_merge: Check first that no merged weight is infinite or NaN.

    Raises ValueError for unknown adapters, adapters that cannot be merged or not together and, with `safe_merge`, for
        non-finite weights, naming the module.
    """
    recall_adapters(model)
    share_out(model)
    modules = adapter_modules(model)
    # A module that was set by itself has adapters of its own that act.
    wanted = {path: module.switch.active if adapter_names is None else adapter_names for path, module in modules}
    names = tuple(model._switch.active if adapter_names is None else adapter_names)
    names = tuple(dict.fromkeys([*names, *(name for own in wanted.values() for name in own)]))
    for name in names:
        config = config_of(model, name)
        if not config.mergeable:
            kind = type(config).__name__.removesuffix("Config")
            raise ValueError(f"adapter {name!r} cannot be merged: {kind} changes more than the weights")
    if not names:
        return
    before = merged_adapters(model)
    new = tuple(name for name in dict.fromkeys(names) if name not in before)
    names = before + new
    if before and not new:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        return
    here = {path: (*before, *(name for name in new if name in wanted[path])) for path, _ in modules}
    for path, module in modules:
        _check_one(path, module, here[path])
        reason = module.unmergeable(here[path])
        if reason is not None:
            raise NotMergeableError(f"{path}: {reason} (adapters {list(names)})")
    check_shared(model, modules, here)
    if before:
        warnings.warn(
            f"Already following adapters were merged {','.join(before)}. You are now additionally merging "
            f"{','.join(new)}.",
            stacklevel=2,
        )
    # From the original weights, so that the sum is rounded once.
    unmerge(model)
    try:
        for path, module in modules if safe_merge else ():
            if not module.finite_here(here[path]):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: merging "
                    f"would make a weight of {path} infinite or NaN"
                )
    except Exception:
        here = dict.fromkeys(here, before)
        raise
    finally:
        for path, module in modules:
            if here[path]:
                module.fold_here(here[path])


def unmerge_adapters(model: AdaptedModel) -> None:
    """Put the original base weights back, bit for bit; if nothing is merged, a warning says so."""
    if not merged_adapters(model):
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
    unmerge(model)


def merged_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are merged now."""
    return tuple(next((m.merged_adapters for _, m in adapter_modules(model) if m.merged_adapters), ()))


def check_compatible(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise ValueError if two of the adapters replace the same base tensor, so that they cannot act together."""
    for path, module in adapter_modules(model) if len(names) > 1 else ():
        _check_one(path, module, names)


def _check_one(path: str, module: AdapterModule, names: tuple[str, ...]) -> None:
    owners: dict[str, str] = {}
    for name in names:
        for tensor in module.replaced_tensors(name):
            if owners.setdefault(tensor, name) != name:
                raise ValueError(
                    f"adapters {owners[tensor]!r} and {name!r} cannot act together: both train "
                    f"{path}.{tensor} whole, whose values by the first are already defined and would result in "
                    "undefined merging behavior"
                )


def unload(model: AdaptedModel) -> Any:
    """Remove all adapters and return the plain model, base weights as they were."""
    unmerge(model)
    return _remove_adapters(model)


def merge_and_unload(
    model: AdaptedModel,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
    requantize: bool = False,
) -> Any:
    """Fold the adapters (those that act by default) into the weights and return the plain model.

    Args:
        progressbar: Accepted for compatibility.
        requantize: For a 4-bit model. By default all its layers come back dense, in the dtype of the rest of the model
            (their own, where that has several), as they acted with the adapter. True quantizes the merged weights
            again: small, but rounded. The log says which of the two happened.

    Raises as `merge`.
    """
    merge(model, adapter_names, safe_merge)
    packed = next((module for module in model.modules() if isinstance(module, Packed)), None)
    for _, module in adapter_modules(model) if requantize else ():
        module.requantize_here()
    beside = one_dtype(model)
    plain = _remove_adapters(model)
    if packed is not None and requantize:
        logger.warning("merged into NF4: the merged weights were quantized again, which rounds them")
    elif packed is not None:
        with in_memory(plain):
            packed.make_dense(plain, beside)
        if getattr(plain, "hf_quantizer", None) is not None:
            plain.hf_quantizer.remove_quantization_config(plain)
        logger.warning("merged into %s: the model is no longer quantized", _weight_dtype(plain))
    return plain


def _remove_adapters(model: AdaptedModel) -> Any:
    """Take all mixins out, `PeftModel` itself too. Merged weights stay; a merged packed layer becomes a dense one."""
    for path, module in list(adapter_modules(model)):
        dense = module.dense_form_here()
        module.detach()
        if dense is not None:
            model.set_submodule(path, dense.requires_grad_(False))
    untie_different_embeddings(model)
    tell_quantizer(model, attached=False)
    for part in model.modules():
        if vars(part).get("_adapted_model") is model:
            del part._adapted_model
            mix_out(part, Face)
    del model.peft_config, model._switch, model._targets, model._row_checks
    follow_class(model)
    mix_out(model, Face)
    return model


def _weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first linear layer's weight."""
    return next(module.weight.dtype for module in model.modules() if isinstance(module, nn.Linear))

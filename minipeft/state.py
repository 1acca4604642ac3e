"""The tensors of an adapter by their names on disk, out of a model and into one.

A tensor is called `base_model.model.` + its module's name + its own name without the adapter's, as in PEFT's files
(without the prefix for a model that is no `PeftModel`). Loading is strict: an error names the tensors that do not fit,
where PEFT loads those that fit and is silent about the rest.
"""

from __future__ import annotations

import collections
import copy
import difflib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.attach import adapter_modules
from minipeft.config import PeftConfig
from minipeft.embeddings import embedding_keys, embeddings_to_save, on_disk
from minipeft.later_biases import room_for_biases
from minipeft.meta import take_values
from minipeft.methods import method_of
from minipeft.renaming import following
from minipeft.shards import whole

KEY_PREFIX = PeftConfig.key_prefix

LoadResult = collections.namedtuple("LoadResult", ["missing_keys", "unexpected_keys"])


def key_prefix(model: Any, adapter: str) -> str:
    """The first part of the names on disk of `adapter` in `model`: nothing for a model that is no `PeftModel`."""
    if not hasattr(model, "peft_config"):
        return ""
    return model.peft_config[adapter].key_prefix if adapter in model.peft_config else KEY_PREFIX


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: str | bool = "auto",
    plain: bool = False,
) -> dict[str, Tensor]:
    """The tensors of an adapter under their names on disk (without the adapter's name).

    Args:
        state_dict: Values by their names in `model.state_dict()`; the model's own by default.
        save_embedding_layers: See `PeftModel.save_pretrained`.
        plain: Those of the plain adapter that acts alike (`AdapterModule.plain_state`); not PEFT's.

    Raises ValueError when there is no such adapter.
    """
    prefix, values = key_prefix(model, adapter_name), _values_in(model, state_dict)
    tensors = stored_state(model, adapter_name, prefix, values, plain)
    if not tensors:
        raise ValueError(f"there is no adapter called {adapter_name!r} in this model")
    embeddings, own = embeddings_to_save(model, adapter_name, save_embedding_layers, prefix), tensors.keys()
    return {**tensors, **{key: values(tensor) for key, tensor in embeddings.items() if key not in own}}


def training_state_dict(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors that training goes on from, where the adapter's file lacks them (a prefix's projection); or none."""
    prefix, values = key_prefix(model, adapter_name), _values_in(model, state_dict)
    live, stored = adapter_state(model, adapter_name, prefix), stored_state(model, adapter_name, prefix, values)
    return {key: values(tensor) for key, tensor in live.items() if key not in stored}


def _values_in(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> Callable[[Tensor], Tensor]:
    """A function from a live tensor of `model` to the tensor to store: itself, or its value in `state_dict`."""
    if state_dict is None:
        return lambda tensor: tensor
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    return lambda tensor: state_dict[names[id(tensor)]]


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Copy values (as from `get_peft_model_state_dict`) into an adapter that exists, those of former times, too.

    Raises ValueError naming tensors that are missing, unknown or of a wrong shape; nothing is changed then.
    """
    if ignore_mismatched_sizes:
        raise ValueError("ignore_mismatched_sizes=True is not supported: an adapter that does not fit is an error")
    config = copy.deepcopy(getattr(model, "peft_config", {}).get(adapter_name))
    fill_adapter(model, adapter_name, of_today(model, config, peft_model_state_dict), "the given state dict")
    return LoadResult([], [])


def of_today(model: nn.Module, config: PeftConfig | None, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of `model` that those of a file of former times stand for; `config` is made to say the same."""
    renew = method_of(str(config.type_name)).load("files") if config is not None else None
    return stored if renew is None else renew(model, config, stored)


def fill_adapter(
    model: nn.Module,
    adapter: str,
    stored: Mapping[str, Tensor],
    source: str,
    training: Mapping[str, Tensor] = types.MappingProxyType({}),
) -> None:
    """Copy tensors that were read into the tensors of `adapter`.

    Args:
        stored: The tensors of the adapter's file.
        source: Names the file in errors.
        training: Tensors of the second file (`training_state_dict`), if there is one; used only if `adapter` is held
            in the form that is trained.

    Raises ValueError as `load_tensors`; and when `stored` does not follow from `training`.
    """
    prefix = key_prefix(model, adapter)
    with room_for_biases(model, adapter, stored, lambda: adapter_state(model, adapter, prefix)):
        _fill(model, adapter, prefix, stored, source, training)


def _fill(
    model: nn.Module,
    adapter: str,
    prefix: str,
    stored: Mapping[str, Tensor],
    source: str,
    training: Mapping[str, Tensor],
) -> None:
    live, embeddings = adapter_state(model, adapter, prefix), embedding_keys(model, adapter, prefix)
    stored = following(stored, [*live, *embeddings], model, prefix)
    # A prefix with a projection trains other tensors than its file holds: `made` are the file's tensors that are
    # computed from trained ones. A file whose keys are those of the live tensors has none.
    products = stored_state(model, adapter, prefix) if training or stored.keys() != live.keys() else live
    made = [name for name in products if name not in live]
    read = {**stored, **training} if made else stored
    given = {name: tensor for name, tensor in read.items() if name not in made}
    load_tensors(live, given, source, embeddings)
    again = stored_state(model, adapter, prefix) if made else {}
    for name in made:
        if name in stored and not torch.allclose(
            whole(again[name]), stored[name].to(again[name].device, again[name].dtype), rtol=1e-3, atol=1e-3
        ):
            raise ValueError(f"{source}: its projection is that of another adapter; remove its file to go on without")


def adapter_state(model: nn.Module, adapter: str, prefix: str = KEY_PREFIX) -> dict[str, Tensor]:
    """The live tensors of `adapter` in `model`, by their names on disk."""
    return {
        _on_disk(prefix, path, name): tensor
        for path, module in adapter_modules(model)
        for name, tensor in module.adapter_state(adapter).items()
    }


def stored_state(
    model: nn.Module,
    adapter: str,
    prefix: str = KEY_PREFIX,
    values: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    plain: bool = False,
) -> dict[str, Tensor]:
    """The tensors in the file of `adapter`, by name: the live tensors, or those that the method computes from them.

    Args:
        values: Gives the tensor to store for a live one.
        plain: Those of the plain adapter that acts alike.
    """
    tensors = {}
    for path, module in adapter_modules(model):
        own = module.plain_state(adapter, values) if plain else module.stored_state(adapter, values)
        tensors.update({_on_disk(prefix, path, name): tensor for name, tensor in own.items()})
    return tensors


def _on_disk(prefix: str, path: str, name: str) -> str:
    return name[1:] if name.startswith("/") else f"{prefix}{on_disk(path)}{name}"


@torch.no_grad()
def load_tensors(
    expected: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    source: str,
    embeddings: Mapping[str, Tensor],
) -> None:
    """Copy `stored` into the live tensors `expected`, all of them or, on an error, none.

    Args:
        expected: On-disk names to live tensors (`adapter_state`).
        stored: The tensors that were read, by name.
        source: Names the file in errors.
        embeddings: Base embeddings that the file may hold besides (`embedding_keys`); a value that differs from the
            model's is copied into it, as PEFT does, since the adapter was trained on it.

    Raises ValueError naming missing and unexpected tensors and wrong shapes.
    """
    stored = _without_repeats(stored, expected, embeddings)
    extra = {name for name in stored if name not in expected and name in embeddings}
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected and name not in extra]
    if missing or unexpected:
        raise ValueError(f"{source} does not fit this model: " + "; ".join(_key_errors(missing, unexpected, expected)))
    targets = {**expected, **{name: embeddings[name] for name in extra}}
    for name, target in targets.items():
        if stored[name].shape != target.shape:
            raise ValueError(
                f"{source} does not fit this model: {name} has shape {tuple(stored[name].shape)}, "
                f"expected {tuple(target.shape)}"
            )
    for name, target in targets.items():
        take_values(target, stored[name])


def _without_repeats(
    stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], embeddings: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`stored` without tensors that PEFT writes twice, of a head or an embedding that is trained whole.

    With bias="all", and once the vocabulary was resized, the trained tensor is there under PEFT's inner name
    (`head.modules_to_save.bias`) too, and the base's own beside it (`head.original_module.bias`), which stands aside
    while the adapter acts: of an embedding it is the resized one. Values that differ are no repeat.
    """

    def repeats(name: str) -> bool:
        once = re.sub(r"\.(modules_to_save|original_module)\.(?=(bias|weight)$)", ".", name)
        if once == name or once not in expected or once not in stored:
            return False
        return ".original_module." in name or torch.equal(stored[name], stored[once])

    kept = {name: tensor for name, tensor in stored.items() if name in expected or not repeats(name)}
    for name in stored:
        base = name.replace(".original_module.weight", ".base_layer.weight")
        if base != name and base in embeddings:
            kept[base] = stored[name]
    return kept


def _key_errors(missing: list[str], unexpected: list[str], expected: Iterable[str]) -> list[str]:
    parts = []
    if missing:
        parts.append(f"missing tensors {_some(missing)}")
    if unexpected:
        near = difflib.get_close_matches(unexpected[0], list(expected)[:500], n=1)
        parts.append(f"unknown tensors {_some(unexpected)}" + (f" (the model has {near[0]})" if near else ""))
    return parts


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

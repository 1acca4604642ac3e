"""Adapters of a model in and out of directories: all of a loaded adapter fits the model, or nothing is changed.

The default adapter lies in the directory itself, others in a subfolder of their name. `state.py` gives the tensors
their names, `directory.py` reads and writes one adapter's files.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from minipeft import asked
from minipeft.adapter import AdaptedModel
from minipeft.attach import (
    adapter_modules,
    add_adapter,
    base_name,
    config_of,
    delete_adapter,
    set_trainable,
)
from minipeft.card import write_card
from minipeft.config import PeftConfig
from minipeft.directory import find_adapter, read_marks, read_tensors, read_training_tensors, save_adapter
from minipeft.files import atomic_path
from minipeft.gathered import check_comes_first
from minipeft.hub import base_names, hub_arguments
from minipeft.meta import recall_adapters
from minipeft.mixins import plain_class
from minipeft.preparing import reshaped
from minipeft.renaming import mapped
from minipeft.shards import check_not_split, is_sharded, whole
from minipeft.state import (
    LoadResult,
    fill_adapter,
    get_peft_model_state_dict,
    load_tensors,
    of_today,
    training_state_dict,
)
from minipeft.stored import naming

logger = logging.getLogger("minipeft")

# transformers' Trainer resumes from, and goes back to the best of, folders of this name. For a model whose class is
# not PEFT's own it wants a state dict in this file there, and gives it to `load_state_dict(strict=False)`.
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")
_TRAINER_WEIGHTS = "model.safetensors"

# Arguments of PEFT's and of Trainer's that have no meaning here, and the values under which they may be given.
_IGNORED_AT_SAVING: dict[str, Any] = {
    "push_to_hub": False,
    "token": ...,
    "variant": None,
    "max_shard_size": ...,
    "save_function": ...,  # accelerate passes its own, which would write the same tensors
}


def load_adapter(
    model: AdaptedModel,
    model_id: str | Path,
    adapter_name: str,
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    autocast_adapter_dtype: bool = True,
    subfolder: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **others: Any,
) -> LoadResult:
    """Load the adapter `model_id`, a folder or a name on the hub, beside those of `model`; it is not activated.

    An adapter of that name is given the stored values if they fit it. Tensors under names that transformers has given
    up since go under the new ones.

    Args:
        is_trainable: Turn the gradients of the adapter's tensors on; if not, the model is put in eval mode.
        config: Used in the place of the directory's `adapter_config.json`.
        autocast_adapter_dtype: Hold the adapter in float32 over a 16-bit or 4-bit model.
        key_mapping: Regular expression -> replacement, for the stored names without "base_model.model.".
        others: How to reach the hub (`hub.HUB_ARGUMENTS`), and what is asked of the base model (`asked.py`).

    Raises FileNotFoundError when there is no adapter, ValueError when it does not fit, the model is split by tensor
    parallelism, or sharded (FSDP2) while a new adapter is trainable or made of base weights; it is then as before.
    """
    hub = hub_arguments(others)
    check_not_split(model)
    asked.answer("load_adapter", model, others)
    directory = find_adapter(model_id, subfolder, **hub)
    config = config if config is not None else PeftConfig.from_pretrained(directory)
    if others.get("ephemeral_gpu_offload"):
        _set_offload(config)
    stored = of_today(model, config, mapped(read_tensors(directory), key_mapping or {}, config.key_prefix))
    config.check_marks(read_marks(directory), str(directory))
    _warn_other_base(model, config, directory)
    exists = adapter_name in model.peft_config
    if is_trainable and not exists:
        check_comes_first(model)
    if exists:
        _check_same_settings(model, config, adapter_name, directory)
    training = read_training_tensors(directory)
    if not exists:
        config.for_loading(is_trainable, bool(training))
    with naming(directory), contextlib.nullcontext() if exists else reshaped(model, config):
        if not exists:
            add_adapter(model, adapter_name, config, autocast_adapter_dtype, init=False)
        try:
            fill_adapter(model, adapter_name, stored, str(directory), training)
        except BaseException:
            if not exists:
                delete_adapter(model, adapter_name)
            raise
    if not exists or is_trainable:
        set_trainable(model, adapter_name, is_trainable)
    model.peft_config[adapter_name].inference_mode = not is_trainable
    if not is_trainable and model.training:
        model.eval()
    return LoadResult([], [])


def save_adapters(
    model: AdaptedModel,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    path_initial_model_for_weight_conversion: str | Path | None = None,
    **ignored: Any,
) -> None:
    """Write the adapters, and nothing of the base model, to `save_directory` in PEFT's format.

    Args:
        selected_adapters: Their names; all of them by default. "default" lies in the directory itself, others in a
            subfolder of their name.
        save_embedding_layers: True to store base embeddings too; "auto" does so when one is a target or the vocabulary
            is not the size that the base model's own folder says.
        is_main_process: False writes nothing: another process does. It gives its part of sharded tensors.
        state_dict: Take the tensors from here (by their names in `model.state_dict()`) instead of the model.
        path_initial_model_for_weight_conversion: Write PiSSA adapters as plain LoRA of twice the rank, which every
            reader can use on the base model. Any path will do: the model knows what its adapters started from.
        ignored: Arguments of PEFT's that change nothing (`_IGNORED_AT_SAVING`).

    Raises ValueError for an adapter that does not exist, and for arguments of PEFT's that are not supported.
    """
    recall_adapters(model)
    if not safe_serialization:
        raise ValueError("safe_serialization=False would write a pickle; adapters are written as safetensors")
    _refuse("save_pretrained", ignored, _IGNORED_AT_SAVING)
    selected = list(model.peft_config) if selected_adapters is None else selected_adapters
    for adapter in selected:
        config_of(model, adapter)
    # Asked of several processes alone: walking through all parameters costs as much as saving an adapter.
    several = distributed.is_available() and distributed.is_initialized()
    sharded = several and any(is_sharded(parameter) for parameter in model.parameters())
    if not is_main_process and not sharded:
        return
    directory, plain = Path(save_directory), path_initial_model_for_weight_conversion is not None
    for adapter in selected:
        config = _config_to_save(model, adapter)
        config = config.plain() if plain else config
        tensors = get_peft_model_state_dict(model, state_dict, adapter, save_embedding_layers, plain)
        training = training_state_dict(model, adapter, state_dict)
        if sharded:  # every process gives its part
            tensors, training = ({name: whole(t) for name, t in part.items()} for part in (tensors, training))
        if not is_main_process:
            continue
        if config.saving_notice() is not None:
            logger.warning("adapter %r: %s", adapter, config.saving_notice())
        folder = directory if adapter == "default" else directory / adapter
        save_adapter(folder, config, tensors, training)
        write_card(model, config, folder)
    if is_main_process and _TRAINER_FOLDER.fullmatch(directory.name):
        with atomic_path(directory / _TRAINER_WEIGHTS) as temporary:
            tensors = {name: tensor.detach() for name, tensor in _adapter_state_in_memory(model).items()}
            save_file(tensors, temporary, metadata={"format": "pt"})


def push_to_hub(
    model: AdaptedModel,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **saving: Any,
) -> Any:
    """Upload what `save_adapters` writes to a hub's repository, which is made if there is none.

    Args:
        saving: Arguments of `save_adapters`.

    Returns: huggingface_hub's description of the commit. Raises its errors, and those of `save_adapters`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(model, folder, **saving)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def left_out_of_adapters(model: AdaptedModel, state_dict: Mapping[str, Any]) -> list[str] | None:
    """The trained tensors that `state_dict` lacks, if it holds adapters, or parts, and nothing of the base model.

    Names are those of `model.state_dict()`. Frozen tensors are not counted: a checkpoint of what is trained lacks them.
    None for a state that holds something of the base model, and for an empty one.

    Raises ValueError when such a state holds what is not of the adapters that are attached: Trainer, which resumes from
    it, would go on with an optimizer that belongs to other parameters.
    """
    own = _adapter_state_in_memory(model)
    base = model.state_dict().keys() - own.keys()
    if not state_dict or state_dict.keys() & base:
        return None
    given = {name: tensor.detach() for name, tensor in own.items() if name in state_dict}
    load_tensors(given, state_dict, "the state of adapters", {})
    return [name for name, tensor in own.items() if tensor.requires_grad and name not in given]


def _config_to_save(model: AdaptedModel, adapter: str) -> PeftConfig:
    config: PeftConfig = copy.deepcopy(model.peft_config[adapter])
    config.base_model_name_or_path = config.base_model_name_or_path or base_name(model)
    if config.task_type is None:
        plain = plain_class(model)
        config.auto_mapping = {"base_model_class": plain.__name__, "parent_library": plain.__module__}
    return config


def _adapter_state_in_memory(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters, by their names in `model.state_dict()`."""
    own = {
        id(tensor)
        for _, module in adapter_modules(model)
        for adapter in module.adapter_names()
        for tensor in module.adapter_state(adapter).values()
    }
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) in own}


def _check_same_settings(model: AdaptedModel, stored: PeftConfig, adapter: str, directory: Path) -> None:
    """Raise ValueError if tensors stored under `stored` would act otherwise under the config of `adapter`."""
    here: Any = model.peft_config[adapter]
    ours, theirs = here.to_dict(), stored.to_dict()
    free = here.fields_of_training() & stored.fields_of_training()
    if hasattr(here, "settings_for") and hasattr(stored, "settings_for"):
        held = [f"{path}.{name}" for path, m in adapter_modules(model) for name in m.parameter_targets(adapter)]
        if all(here.settings_for(place) == stored.settings_for(place) for place in (*model._targets[adapter], *held)):
            free |= {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    for field in ours.keys() | theirs.keys():
        if field not in free and ours.get(field) != theirs.get(field):
            raise ValueError(
                f"{directory} does not fit the adapter {adapter!r} that is there: {field} is {theirs.get(field)!r}, "
                f"expected {ours.get(field)!r}; load it under another name"
            )


def _warn_other_base(model: nn.Module, config: PeftConfig, directory: Path) -> None:
    trained_on, here = config.base_model_name_or_path, base_name(model)
    if trained_on and here and base_names(trained_on).isdisjoint(base_names(here)):
        logger.warning("the adapter at %s was trained on %r, this model is %r", directory, trained_on, here)


def _set_offload(config: Any) -> None:
    if not hasattr(config, "runtime_config"):
        warnings.warn("Ephemeral GPU offloading is not supported for this model. Ignoring.", stacklevel=4)
        return
    config.runtime_config.ephemeral_gpu_offload = True


def _refuse(function: str, given: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    """Raise for an argument that is unknown, or known but set to something other than its neutral value."""
    for name, value in given.items():
        if name not in neutral:
            raise TypeError(f"{function}() does not take {name!r}")
        if value is not None and neutral[name] is not ... and value != neutral[name]:
            raise ValueError(f"{function}({name}={value!r}) is not supported by minipeft")

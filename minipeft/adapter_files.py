"""Adapters in and out of files: the part of `PeftModel` that loads and saves."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minipeft import checkpoint
from minipeft.configs import PeftConfig, PeftType
from minipeft.files import atomic_path
from minipeft.patching import adapter_modules
from minipeft.state_dict import (
    LoadResult,
    adapter_state,
    base_name,
    embedding_keys,
    get_peft_model_state_dict,
    key_prefix,
    load_tensors,
    stored_state,
    training_state_dict,
)

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

logger = logging.getLogger("minipeft")

# transformers' Trainer resumes from, and goes back to the best of, folders of this name. For a model whose class is
# not PEFT's own it wants a state dict in this file there, and gives it to `load_state_dict(strict=False)`.
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")
_TRAINER_WEIGHTS = "model.safetensors"


class AdapterFiles(_Base):
    """Loading and saving of a model's adapters (mixed into `PeftModel`)."""

    if TYPE_CHECKING:
        peft_config: dict[str, Any]
        delete_adapter: Any
        _attach: Any
        _config_of: Any
        _set_trainable: Any

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load the adapter in directory `model_id` beside those that are there; it is not activated.

        An adapter of that name is given the stored values if they fit it.

        Raises FileNotFoundError or ValueError as `from_pretrained`; the model is then as before.
        """
        subfolder = kwargs.pop("subfolder", None)
        _refuse(
            "load_adapter",
            kwargs,
            torch_device=None,
            low_cpu_mem_usage=Ellipsis,
            ephemeral_gpu_offload=False,
            key_mapping=None,
        )
        directory = Path(model_id) / (subfolder or "")
        config = copy.deepcopy(config) if config is not None else PeftConfig.from_pretrained(directory)
        stored = checkpoint.read_tensors(directory)
        _warn_other_base(self, config, directory)
        exists = adapter_name in self.peft_config
        training = checkpoint.read_training_tensors(directory)
        if not exists:
            config.for_loading(is_trainable, bool(training))
            self._attach(adapter_name, config, autocast_adapter_dtype, init=False)
        try:
            self._fill(adapter_name, stored, training, str(directory))
        except BaseException:
            if not exists:
                self.delete_adapter(adapter_name)
            raise
        if not exists or is_trainable:
            self._set_trainable(adapter_name, is_trainable)
        self.peft_config[adapter_name].inference_mode = not is_trainable
        return LoadResult([], [])

    def _fill(self, adapter: str, stored: dict[str, Tensor], training: dict[str, Tensor], source: str) -> None:
        """Copy what was read into the tensors of `adapter`: `training` where `stored` has only what came of it.

        Raises ValueError when something does not fit, or the two files are not of one adapter.
        """
        prefix = key_prefix(self, adapter)
        live, products = adapter_state(self, adapter, prefix), stored_state(self, adapter, prefix)
        made = [name for name in products if name not in live]
        given = {name: tensor for name, tensor in stored.items() if name not in made}
        load_tensors(live, {**given, **training} if made else stored, source, embedding_keys(self, prefix))
        again = stored_state(self, adapter, prefix)
        for name in made:
            if name in stored and not torch.allclose(again[name], stored[name].to(again[name]), rtol=1e-3, atol=1e-3):
                raise ValueError(f"{source}: {checkpoint.TRAINING_NAME} is of another adapter; remove it to go without")

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters, and nothing of the base model, to `save_directory` in PEFT's format.

        Args:
            selected_adapters: Which; all of them by default. "default" lies in the directory itself, others in a
                subfolder of their name.
            save_embedding_layers: Whether base embeddings are stored too; "auto" does so when one is a target or the
                vocabulary is not the size that the base model's own folder says.
            state_dict: Take the tensors from here (by their names in `self.state_dict()`) instead of the model.

        Raises ValueError for an adapter that does not exist, and for arguments of PEFT's that are not supported.
        """
        if not self.peft_config:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
            return
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; adapters are written as safetensors")
        _refuse(
            "save_pretrained",
            kwargs,
            push_to_hub=False,
            token=Ellipsis,
            variant=None,
            max_shard_size=Ellipsis,
        )
        selected = list(self.peft_config) if selected_adapters is None else selected_adapters
        for adapter in selected:
            self._config_of(adapter)
        if not is_main_process:
            return
        directory = Path(save_directory)
        for adapter in selected:
            config = self._config_to_save(adapter)
            tensors = get_peft_model_state_dict(self, state_dict, adapter, save_embedding_layers)
            folder = directory if adapter == "default" else directory / adapter
            training = training_state_dict(self, adapter, state_dict)
            checkpoint.save_adapter(folder, config, tensors, _model_card(config), training)
        if _TRAINER_FOLDER.fullmatch(directory.name):
            with atomic_path(directory / _TRAINER_WEIGHTS) as temporary:
                save_file(self._adapter_state_in_memory(), temporary, metadata={"format": "pt"})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; with `strict=False`, a state of adapters alone lacks nothing."""
        result = super().load_state_dict(state_dict, strict, assign)
        own = self._adapter_state_in_memory()
        if not strict and state_dict and all(name in own for name in state_dict):
            result.missing_keys[:] = [name for name in result.missing_keys if name in own]
        return result

    def _config_to_save(self, adapter: str) -> PeftConfig:
        config = copy.deepcopy(self.peft_config[adapter])
        config.base_model_name_or_path = config.base_model_name_or_path or base_name(self)
        if config.task_type is None:
            plain = type(self)._plain_class  # type: ignore[attr-defined]
            config.auto_mapping = {"base_model_class": plain.__name__, "parent_library": plain.__module__}
        return config

    def _adapter_state_in_memory(self) -> dict[str, Tensor]:
        """The tensors of all adapters, by their names in `state_dict()`."""
        own = {
            id(tensor)
            for _, module in adapter_modules(self)
            for adapter in module.adapter_names()
            for tensor in module.adapter_state(adapter).values()
        }
        return {n: t.detach() for n, t in self.state_dict(keep_vars=True).items() if id(t) in own}


def _warn_other_base(model: nn.Module, config: PeftConfig, directory: Path) -> None:
    trained_on, here = config.base_model_name_or_path, base_name(model)
    if trained_on and here and Path(trained_on).name != Path(here).name:
        logger.warning("the adapter at %s was trained on %r, this model is %r", directory, trained_on, here)


def _refuse(function: str, given: Mapping[str, Any], **neutral: Any) -> None:
    """Raise for an argument that is unknown, or known but set to something other than its neutral value."""
    for name, value in given.items():
        if name not in neutral:
            raise TypeError(f"{function}() does not take {name!r}")
        if neutral[name] is not Ellipsis and value != neutral[name]:
            raise ValueError(f"{function}({name}={value!r}) is not supported by minipeft")


def _model_card(config: PeftConfig) -> str:
    base = config.base_model_name_or_path
    lines = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags:", "- minipeft"]
    kind = PeftType(config.peft_type).value
    return "\n".join([*lines, "---", "", f"# {kind} adapter", "", f"Base model: {base or 'not recorded'}", ""])

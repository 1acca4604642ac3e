"""Adapters in and out of files: the part of `PeftModel` that loads and saves."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from minipeft import saving
from minipeft.adapter import Mixin
from minipeft.attach import adapter_modules
from minipeft.config import PeftConfig, PeftType
from minipeft.files import atomic_path
from minipeft.lora.init import as_plain_lora, changes_base, pissa_starts, plain_config
from minipeft.state import (
    LoadResult,
    base_name,
    fill_adapter,
    get_peft_model_state_dict,
    load_tensors,
    training_state_dict,
)

logger = logging.getLogger("minipeft")

# transformers' Trainer resumes from, and goes back to the best of, folders of this name. For a model whose class is
# not PEFT's own it wants a state dict in this file there, and gives it to `load_state_dict(strict=False)`.
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+")
_TRAINER_WEIGHTS = "model.safetensors"


class AdapterFiles(Mixin):
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
        # What says where to put tensors or how to reach a hub has no meaning here: they go where the model is.
        hub = dict.fromkeys(("revision", "token", "cache_dir", "local_files_only", "force_download"), Ellipsis)
        placement = dict.fromkeys(("torch_device", "device_map", "max_memory", "low_cpu_mem_usage"), Ellipsis)
        _refuse("load_adapter", kwargs, **hub, **placement, ephemeral_gpu_offload=False, key_mapping=None)
        directory = Path(model_id) / (subfolder or "")
        if not directory.is_dir():
            raise FileNotFoundError(
                f"no adapter at {str(directory)!r}: expected a directory with {saving.CONFIG_NAME}; for an adapter "
                "on a hub, download it first (huggingface_hub.snapshot_download) and give its folder"
            )
        config = copy.deepcopy(config) if config is not None else PeftConfig.from_pretrained(directory)
        stored = saving.read_tensors(directory)
        config.check_marks(saving.read_marks(directory), str(directory))
        _warn_other_base(self, config, directory)
        exists = adapter_name in self.peft_config
        if exists:
            _check_same_settings(self.peft_config[adapter_name], config, adapter_name, directory)
        training = saving.read_training_tensors(directory)
        if not exists:
            config.for_loading(is_trainable, bool(training))
            self._attach(adapter_name, config, autocast_adapter_dtype, init=False)
        try:
            fill_adapter(self, adapter_name, stored, str(directory), training)
        except BaseException:
            if not exists:
                self.delete_adapter(adapter_name)
            raise
        if not exists or is_trainable:
            self._set_trainable(adapter_name, is_trainable)
        self.peft_config[adapter_name].inference_mode = not is_trainable
        return LoadResult([], [])

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters, and nothing of the base model, to `save_directory` in PEFT's format.

        Args:
            selected_adapters: Which; all of them by default. "default" lies in the directory itself, others in a
                subfolder of their name.
            save_embedding_layers: Whether base embeddings are stored too; "auto" does so when one is a target or the
                vocabulary is not the size that the base model's own folder says.
            state_dict: Take the tensors from here (by their names in `self.state_dict()`) instead of the model.
            path_initial_model_for_weight_conversion: Write PiSSA adapters as plain LoRA of twice the rank, which every
                reader can use on the base model. Any path will do: the model knows what its adapters started from.

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
            save_function=Ellipsis,  # accelerate passes its own, which would write the same tensors
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
            if path_initial_model_for_weight_conversion is not None:
                config = plain_config(config)
                tensors = as_plain_lora(tensors, pissa_starts(self, adapter, config.key_prefix))
            if config.file_marks():
                logger.warning(
                    "adapter %r: PEFT would start init_lora_weights=%r from other random numbers and read it wrongly; "
                    "for PEFT, save it with path_initial_model_for_weight_conversion, as plain LoRA",
                    adapter,
                    config.init_lora_weights,  # type: ignore[attr-defined]
                )
            saving.save_adapter(folder, config, tensors, _model_card(config), training)
        if _TRAINER_FOLDER.fullmatch(directory.name):
            with atomic_path(directory / _TRAINER_WEIGHTS) as temporary:
                save_file(self._adapter_state_in_memory(), temporary, metadata={"format": "pt"})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; with `strict=False`, a state of adapters alone lacks nothing.

        Raises ValueError when such a state is not of the adapters that are attached: Trainer, which resumes this way,
        would go on with an optimizer that belongs to other parameters.
        """
        own = self._adapter_state_in_memory()
        base = self.state_dict().keys() - own.keys()
        adapters_alone = not strict and bool(state_dict) and not (state_dict.keys() & base)
        if adapters_alone:
            load_tensors(own, state_dict, "the state of adapters", {})
        result = super().load_state_dict(state_dict, strict, assign)
        if adapters_alone:
            result.missing_keys.clear()
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


# Fields of a config that change nothing about what an adapter with given tensors computes.
_ABOUT_TRAINING = {
    *("inference_mode", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type"),
    *("lora_dropout", "dropout", "init_lora_weights", "target_modules", "exclude_modules", "fan_in_fan_out"),
}


def _check_same_settings(here: PeftConfig, stored: PeftConfig, adapter: str, directory: Path) -> None:
    """Raise ValueError if tensors stored under `stored` would act otherwise under `here`."""
    ours, theirs = here.to_dict(), stored.to_dict()
    started = changes_base(ours.get("init_lora_weights")) or changes_base(theirs.get("init_lora_weights"))
    free = _ABOUT_TRAINING - {"init_lora_weights"} if started else _ABOUT_TRAINING
    for field in ours.keys() | theirs.keys():
        if field not in free and ours.get(field) != theirs.get(field):
            raise ValueError(
                f"{directory} does not fit the adapter {adapter!r} that is there: {field} is {theirs.get(field)!r}, "
                f"expected {ours.get(field)!r}; load it under another name"
            )


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

"""The model with adapters: `get_peft_model` and the `PeftModel` mixin.

PEFT wraps a model. Here the model that comes back is the model that went in: its class gets `PeftModel` mixed in
front, its name and everything it can do stay, so that transformers' Trainer and `generate`, accelerate or an
evaluation harness meet the class that they know. `unload` and `merge_and_unload` take the mixin out again.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Importing it lets transformers read 4-bit checkpoints, so a script that uses adapters can load its base model.
import minipeft.quantization.hf  # noqa: F401
from minipeft.adapter_files import AdapterFiles
from minipeft.configs import PeftConfig
from minipeft.lora_model import LoraModel
from minipeft.methods.base import Switch, mix_in, mix_out
from minipeft.methods.lora import LoraLayer
from minipeft.patching import (
    adapter_modules,
    attach_adapter,
    freeze,
    switch_of,
)
from minipeft.quantization import NF4Linear
from minipeft.state_dict import (
    adapter_state,
    base_name,
)
from minipeft.unloading import (
    dequantize_rest,
    detach_adapters,
    requantize_merged,
    untie_what_differs,
    weight_dtype,
)

logger = logging.getLogger("minipeft")


class PeftModel(LoraModel, AdapterFiles):
    """What a model can do once adapters are attached (mixed in front of its own class).

    Attributes:
        peft_config: adapter name -> its config.
    """

    peft_config: dict[str, Any]
    _switch: Switch

    @classmethod
    def from_pretrained(  # type: ignore[no-untyped-def]
        cls,
        model: Any,
        model_id: str | Path | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ):
        """Attach the adapter in directory `model_id` to `model`, activate it, and return `model`.

        Args:
            is_trainable: Whether the adapter's tensors get gradients; if not, the model is put in eval mode.
            config: Used in the place of the directory's `adapter_config.json`.
            autocast_adapter_dtype: Hold the adapter in float32 over a 16-bit or 4-bit model.

        Raises FileNotFoundError when there is no adapter, ValueError when it does not fit; `model` is then as before.
        """
        if isinstance(model, str | Path) and "_plain_class" in vars(cls):
            return super().from_pretrained(model, **kwargs)  # type: ignore[misc]  # what the plain class's name means
        if model_id is None or isinstance(model, str | Path):
            raise TypeError("PeftModel.from_pretrained takes a model and the adapter's directory")
        kwargs.update(config=config, autocast_adapter_dtype=autocast_adapter_dtype)
        with _becoming_peft_model(model) if not isinstance(model, PeftModel) else contextlib.nullcontext():
            model.load_adapter(model_id, adapter_name, is_trainable, **kwargs)
        model.set_adapter(adapter_name)
        return model if is_trainable else model.eval()

    # Adapters: which there are, which act

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act."""
        return list(self._switch.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts; a list if several do."""
        return self._switch.active[0] if len(self._switch.active) == 1 else list(self._switch.active)

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the (first) adapter that acts."""
        return self._config_of(self._switch.active[0])

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach a new adapter, trainable, beside those that are there; it is not activated.

        Raises ValueError when the name is taken or the config does not fit the model, TypeError for wrong types.
        """
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(_not_a_config(peft_config))
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter called {adapter_name!r} already; delete it or take another name")
        self._attach(adapter_name, copy.deepcopy(peft_config), autocast_adapter_dtype, init=True)
        self._set_trainable(adapter_name, not peft_config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make this adapter, or these together, act, and no other. What was merged is unmerged.

        Unlike PEFT, this does not change which tensors get gradients, unless `inference_mode` turns them off.

        Raises ValueError for an unknown adapter, and for several that replace the same base tensor.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            self._config_of(name)
        self._check_compatible(names)
        self.unmerge_adapter()
        self._switch.active = names
        if inference_mode:
            for name in names:
                self._set_trainable(name, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors; if it was the only one to act, the first of the others acts.

        Raises ValueError for an unknown adapter.
        """
        self._config_of(adapter_name)
        self.unmerge_adapter()
        for _, module in adapter_modules(self):
            module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        left = tuple(name for name in self._switch.active if name != adapter_name)
        self._switch.active = left or tuple(self.peft_config)[:1]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the base model; also when an adapter is merged."""
        merged, enabled = self._merged(), self._switch.enabled
        self.unmerge_adapter()
        self._switch.enabled = False
        try:
            yield
        finally:
            self._switch.enabled = enabled
            if merged:
                self.merge_adapter(list(merged))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain model's, unless an adapter trains an embedding: its tensors would not fit the new one.

        Raises ValueError then.
        """
        ends = [get() for get in (self.get_input_embeddings, self.get_output_embeddings)]  # type: ignore[operator]
        for path, module in adapter_modules(self):
            if (args or kwargs) and any(module is end for end in ends) and module.adapter_names():
                raise ValueError(
                    f"adapters {sorted(module.adapter_names())} train {path}, which cannot be resized under them: "
                    "resize the base model first, then attach adapters"
                )
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (those that act by default) into the base weights; the output stays the same.

        The sum is made in float32 and the original weights are kept, so `unmerge_adapter` is exact.

        Args:
            safe_merge: Check first that no merged weight is infinite or NaN.

        Raises ValueError for unknown adapters and, with `safe_merge`, for non-finite weights, naming the module.
        """
        names = self._switch.active if adapter_names is None else tuple(adapter_names)
        for name in names:
            config = self._config_of(name)
            if not config.mergeable:
                kind = type(config).__name__.removesuffix("Config")
                raise ValueError(f"adapter {name!r} cannot be merged: {kind} changes more than the weights")
        self._check_compatible(names)
        self.unmerge_adapter()
        if safe_merge:
            self._check_finite(names)
        for _, module in adapter_modules(self):
            module.merge(names)

    def unmerge_adapter(self) -> None:
        """Put the original base weights back. Nothing happens if nothing is merged."""
        for _, module in adapter_modules(self):
            module.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> Any:
        """Fold the adapters (those that act by default) into the weights and return the plain model.

        Args:
            requantize: What becomes of a 4-bit model. By default all its layers come back in the dtype that they had
                before quantization, exactly as they acted with the adapter. True quantizes the merged weights again:
                small, but rounded. Which of the two happened is logged.
        """
        self.merge_adapter(adapter_names, safe_merge)
        quantized = any(isinstance(module, NF4Linear) for module in self.modules())
        if requantize:
            requantize_merged(self)
        plain = self.unload(keep_merged=True)
        if quantized and requantize:
            logger.warning("merged into NF4: the merged weights were quantized again, which rounds them")
        elif quantized:
            dequantize_rest(plain)
            logger.warning("merged into %s: the model is no longer quantized", weight_dtype(plain))
        return plain

    def unload(self, keep_merged: bool = False) -> Any:
        """Remove all adapters and return the plain model, base weights as they were (unless `keep_merged`)."""
        if not keep_merged:
            self.unmerge_adapter()
        detach_adapters(self)
        untie_what_differs(self)
        _tell_quantizer(self, attached=False)
        del self.peft_config, self._switch
        mix_out(self)
        return self

    # Looking at it

    def get_base_model(self) -> Any:
        """The model itself: here the adapted model and the base model are one object."""
        return self

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters with a gradient, all parameters); a packed 4-bit weight counts all its values."""
        packed = {id(m.weight): m.in_features * m.out_features for m in self.modules() if isinstance(m, NF4Linear)}
        total = sum(packed.get(id(p), p.numel()) for p in self.parameters())
        return sum(p.numel() for p in self.parameters() if p.requires_grad), total

    def print_trainable_parameters(self) -> None:
        """Print the two numbers of `get_nb_trainable_parameters` and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # Inside

    def _attach(self, adapter: str, config: Any, autocast_adapter_dtype: bool, init: bool) -> None:
        self.unmerge_adapter()
        attach_adapter(self, config, adapter, self._switch, autocast_adapter_dtype, init)
        self.peft_config[adapter] = config
        if not self._switch.active:
            self._switch.active = (adapter,)

    def _config_of(self, adapter: str) -> PeftConfig:
        if adapter not in self.peft_config:
            raise ValueError(f"there is no adapter called {adapter!r}; there are {sorted(self.peft_config)}")
        return self.peft_config[adapter]

    def _set_trainable(self, adapter: str, trainable: bool) -> None:
        for tensor in adapter_state(self, adapter).values():
            if tensor.is_floating_point():
                tensor.requires_grad_(trainable)

    def _merged(self) -> tuple[str, ...]:
        return next((m.merged_adapters for _, m in adapter_modules(self) if m.merged_adapters), ())

    def _check_compatible(self, names: tuple[str, ...]) -> None:
        if len(names) < 2:
            return
        for path, module in adapter_modules(self):
            owners: dict[str, str] = {}
            for name in names:
                for tensor in module.replaced_tensors(name):
                    if owners.setdefault(tensor, name) != name:
                        raise ValueError(
                            f"adapters {owners[tensor]!r} and {name!r} cannot act together: both train "
                            f"{path}.{tensor} whole"
                        )

    def _check_finite(self, names: tuple[str, ...]) -> None:
        for path, module in adapter_modules(self):
            if isinstance(module, LoraLayer) and not torch.isfinite(module.merged_weight(names)).all():
                raise ValueError(f"merging {list(names)} would make a weight of {path} infinite or NaN")


class PeftModelForCausalLM(PeftModel):
    """`PeftModel` of a causal language model (`task_type="CAUSAL_LM"`)."""


def get_peft_model(
    model: Any,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Freeze `model`, attach a new adapter to it, activate it, and return `model`, now also a `PeftModel`.

    Args:
        model: Any torch module; its NF4Linear layers make it QLoRA.
        autocast_adapter_dtype: Hold the adapter in float32 over a 16-bit or 4-bit model.
        low_cpu_mem_usage: Accepted for compatibility: tensors are always made where they stay.

    Raises ValueError when the config does not fit the model, TypeError for wrong types; `model` is then as before.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(_not_a_config(peft_config))
    if mixed:
        raise ValueError("mixed=True is not supported by minipeft: adapters of every method mix without it")
    if isinstance(model, PeftModel):
        raise ValueError(
            f"the model has adapters already ({sorted(model.peft_config)}); use model.add_adapter(name, config)"
        )
    with _becoming_peft_model(model):
        model.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        model.set_adapter(adapter_name)
    config = model.peft_config[adapter_name]
    config.base_model_name_or_path = base_name(model)
    config.revision = revision or config.revision
    return model


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Freeze `model` and put the adapter's modules into it, active, without giving the model `PeftModel`'s methods.

    Raises ValueError for `state_dict` (PEFT takes the targets from it; name them in the config).
    """
    if state_dict is not None:
        raise ValueError("inject_adapter_in_model(state_dict=...) is not supported; name the targets in the config")
    freeze(model)
    switch = switch_of(model)
    attach_adapter(model, copy.deepcopy(peft_config), adapter_name, switch)
    switch.active = (adapter_name,)
    return model


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze `model` and, unless told not to, turn on gradient checkpointing (non-reentrant).

    PEFT also converts every 16-bit parameter to float32, embeddings and head included, which can cost gigabytes.
    Frozen parameters gain nothing from that: they stay as they are; adapters are float32 anyway.
    """
    freeze(model)
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            model.enable_input_require_grads()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    return model


@contextlib.contextmanager
def _becoming_peft_model(model: Any) -> Iterator[None]:
    """Freeze `model` and mix `PeftModel` in; if the block that attaches the first adapter fails, undo both."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    freeze(model)
    plain = type(model)
    causal = plain.__name__.endswith("ForCausalLM") or plain.__name__.endswith("LMHeadModel")
    # The name stays: transformers looks models up by their class's name.
    mix_in(model, PeftModelForCausalLM if causal else PeftModel, plain.__name__)
    model.peft_config = {}
    model._switch = switch_of(model)
    _tell_quantizer(model, attached=True)
    try:
        yield
    except BaseException:
        model.unload()
        for parameter, required in gradients:
            parameter.requires_grad = required
        raise


def _tell_quantizer(model: nn.Module, attached: bool) -> None:
    """transformers trains a quantized model only when its quantizer says it is trainable: with an adapter it is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer._minipeft_attached = attached


def _not_a_config(value: Any) -> str:
    kind = type(value)
    return f"peft_config must be minipeft's LoraConfig or another of its configs, got {kind.__module__}.{kind.__name__}"

"""The model with adapters: `get_peft_model` and the `PeftModel` mixin.

PEFT wraps a model. Here the model that comes back is the model that went in: its class gets `PeftModel` mixed in
front, its name and everything it can do stay, so that transformers' Trainer and `generate`, accelerate or an
evaluation harness meet the class that they know. `unload` and `merge_and_unload` take the mixin out again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Importing it lets transformers read 4-bit checkpoints, so a script that uses adapters can load its base model.
import minipeft.nf4.hf  # noqa: F401
from minipeft.adapter import Switch, mix_in
from minipeft.adapter_files import AdapterFiles
from minipeft.attach import adapter_modules, attach_adapter, switch_of, tell_quantizer
from minipeft.config import PeftConfig
from minipeft.lora_model import LoraModel
from minipeft.merge import MergedModel
from minipeft.state import adapter_state, base_name
from minipeft.status import StatusModel


class PeftModel(LoraModel, MergedModel, StatusModel, AdapterFiles):
    """What a model can do once adapters are attached (mixed in front of its own class).

    Attributes:
        peft_config: adapter name -> its config.
    """

    peft_config: dict[str, Any]
    _switch: Switch

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`PeftModelForCausalLM(model, config, "default")` and its like are `get_peft_model`, as in PEFT."""
        return super().__new__(cls) if "_plain_class" in vars(cls) else get_peft_model(*args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What `__new__` gave is a whole model already.
        if "peft_config" not in vars(self):
            super().__init__(*args, **kwargs)

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

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn the gradients of one or several adapters on or off.

        Raises ValueError for an unknown adapter.
        """
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self._config_of(name)
            self._set_trainable(name, requires_grad)

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

    def disable_adapter_layers(self) -> None:
        """Be the base model until `enable_adapter_layers`; what was merged is unmerged."""
        self.unmerge_adapter()
        self._switch.enabled = False

    def enable_adapter_layers(self) -> None:
        """Let the adapters act again."""
        self._switch.enabled = True

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

    def get_base_model(self) -> Any:
        """The model itself: here the adapted model and the base model are one object."""
        return self

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


class PeftModelForCausalLM(PeftModel):
    """`PeftModel` of a causal language model."""


class PeftModelForSeq2SeqLM(PeftModel):
    """`PeftModel` of an encoder-decoder."""


class PeftModelForSequenceClassification(PeftModel):
    """`PeftModel` of a classifier of texts."""


class PeftModelForTokenClassification(PeftModel):
    """`PeftModel` of a classifier of tokens."""


class PeftModelForQuestionAnswering(PeftModel):
    """`PeftModel` of a model that finds answers in a text."""


class PeftModelForFeatureExtraction(PeftModel):
    """`PeftModel` of a model without a head."""


# By what the names of transformers' classes end with.
_KINDS: dict[str, type[PeftModel]] = {
    "ForCausalLM": PeftModelForCausalLM,
    "LMHeadModel": PeftModelForCausalLM,
    "ForSequenceClassification": PeftModelForSequenceClassification,
    "ForTokenClassification": PeftModelForTokenClassification,
    "ForQuestionAnswering": PeftModelForQuestionAnswering,
    "ForConditionalGeneration": PeftModelForSeq2SeqLM,
    "Model": PeftModelForFeatureExtraction,
}


def _kind_of(model: Any) -> type[PeftModel]:
    name, config = type(model).__name__, getattr(model, "config", None)
    kind = next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), PeftModel)
    # Models that see are called so, too.
    one_text = kind is PeftModelForSeq2SeqLM and not getattr(config, "is_encoder_decoder", False)
    return PeftModelForCausalLM if one_text else kind if config is not None else PeftModel


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


@contextlib.contextmanager
def _becoming_peft_model(model: Any) -> Iterator[None]:
    """Freeze `model` and mix `PeftModel` in; if the block that attaches the first adapter fails, undo both."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.requires_grad = False
    # The name stays: transformers looks models up by their class's name.
    mix_in(model, _kind_of(model), type(model).__name__)
    model.peft_config = {}
    model._switch = switch_of(model)
    tell_quantizer(model, attached=True)
    try:
        yield
    except BaseException:
        model.unload()
        for parameter, required in gradients:
            parameter.requires_grad = required
        raise


def _not_a_config(value: Any) -> str:
    kind = type(value)
    return f"peft_config must be minipeft's LoraConfig or another of its configs, got {kind.__module__}.{kind.__name__}"

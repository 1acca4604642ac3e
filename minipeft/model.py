"""The model with adapters: `get_peft_model` and the `PeftModel` mixin.

PEFT wraps a model. Here the model that comes back is the model that went in: its class gets `PeftModel` mixed in
front, its name and everything it can do stay, so that transformers' Trainer and `generate`, accelerate or an
evaluation harness meet the class that they know. `unload` and `merge_and_unload` take the mixin out again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minipeft import attach, card, disabling, embeddings, merge, paths, preparing, saving, status
from minipeft.adapter import AdaptedModel
from minipeft.attach import add_adapter, base_name, config_of, set_trainable, switch_of, unmerge
from minipeft.beside_peft import KnownToPeft
from minipeft.config import PeftConfig
from minipeft.copies import parameter_called
from minipeft.errors import PeftWarning
from minipeft.meta import take_memory
from minipeft.methods import optional_part
from minipeft.mixins import mix_in
from minipeft.rows import CallsByRow


class PeftModel(CallsByRow, KnownToPeft):
    """The calls that a model has once adapters are attached (mixed in front of its own class).

    Each is a function over the model, or a few lines over some: `attach.py` adds and removes adapters, `merge.py` folds
    them into the weights, `saving.py` reads and writes them, `status.py` counts.

    Attributes:
        peft_config: adapter name -> its config.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`PeftModelForCausalLM(model, config, "default")` and its like are `get_peft_model`, as in PEFT."""
        return super().__new__(cls) if "_plain_class" in vars(cls) else get_peft_model(*args, **kwargs)

    offer = staticmethod(paths.offered_by_model)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Python calls `__init__` also on the finished model that `__new__` returned: then nothing is left to do.
        if "peft_config" not in vars(self):
            super().__init__(*args, **kwargs)

    # Adapters in and out of directories

    @classmethod
    def from_pretrained(  # type: ignore[no-untyped-def]
        cls,
        model: Any,
        model_id: str | Path | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *args: Any,
        **kwargs: Any,
    ):
        """Attach the adapter in directory `model_id` to `model`, activate it, and return `model`.

        Args:
            is_trainable: Turn the gradients of the adapter's tensors on; if not, the model is put in eval mode.
            args, kwargs: Further arguments of `load_adapter`.

        Raises FileNotFoundError when there is no adapter, ValueError when it does not fit; `model` is then as before.
        """
        if isinstance(model, str | Path) and "_plain_class" in vars(cls):
            return super().from_pretrained(model, **kwargs)  # type: ignore[misc]  # the plain class's own meaning
        if model_id is None or isinstance(model, str | Path):
            raise TypeError("PeftModel.from_pretrained takes a model and the adapter's directory")
        with _becoming_peft_model(model) if not isinstance(model, PeftModel) else contextlib.nullcontext():
            model.load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
        return model

    load_adapter = saving.load_adapter

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the adapters in PEFT's format, and nothing of the base model: see `saving.save_adapters`.

        A model whose last adapter was deleted is written as the plain model that it is.
        """
        if self.peft_config:
            saving.save_adapters(self, save_directory, *args, **kwargs)
        else:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    push_to_hub = saving.push_to_hub
    create_or_update_model_card = card.create_or_update_model_card

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; with `strict=False`, a state of adapters alone lacks nothing of the base's.

        Raises ValueError when such a state is not of the adapters that are attached.
        """
        left_out = None if strict else saving.left_out_of_adapters(self, state_dict)
        result = super().load_state_dict(state_dict, strict, assign)
        if left_out is not None:
            result.missing_keys[:] = left_out
        return result

    # The list of adapters, and those that act

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
        return config_of(self, self._switch.active[0])

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach a new adapter beside those that are there; it is frozen and does not act until `set_adapter`.

        The model holds `peft_config` itself, and fills in what it left open. With `low_cpu_mem_usage` the tensors lie
        on the meta device until values are loaded (`minipeft/meta.py`).

        Raises ValueError when the name is taken or the config does not fit the model, TypeError for wrong types.
        """
        _check_config(peft_config)
        _check_free(self, adapter_name)
        add_adapter(self, adapter_name, peft_config, autocast_adapter_dtype, init=not low_cpu_mem_usage)
        if low_cpu_mem_usage:
            take_memory(self, adapter_name)
        set_trainable(self, adapter_name, self.active_adapters == [adapter_name] and not peft_config.inference_mode)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **kwargs: Any,
    ) -> None:
        """Add an adapter that is the weighted combination of others (PEFT's method); it is frozen and not active.

        The arguments are those of the method's own function: for LoRA see `lora/combine.py`.

        Raises ValueError for a name that is taken, unknown adapters, and adapters that do not combine.
        """
        _check_free(self, adapter_name)
        kwargs |= {"svd_rank": svd_rank, "svd_clamp": svd_clamp, "svd_full_matrices": svd_full_matrices}
        kwargs |= {"svd_driver": svd_driver, "density": density, "majority_sign_method": majority_sign_method}
        types = [self.peft_config[name].type_name for name in adapters if name in self.peft_config]
        optional_part("combine", types)(self, adapters, weights, adapter_name, combination_type, **kwargs)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter, or these together, act and get gradients, and no other. Merged adapters are unmerged.

        Args:
            inference_mode: Turn all adapters' gradients off.

        Raises ValueError for an unknown adapter, and for several that replace the same base tensor.
        """
        names = self._names(adapter_name)
        merge.check_compatible(self, names)
        if merge.merged_adapters(self):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            unmerge(self)
        attach.set_active(self, names)
        self._switch.paused = []
        set_trainable(self, names, not inference_mode, others=False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn the gradients of one or several adapters on or off.

        Raises ValueError for an unknown adapter.
        """
        set_trainable(self, self._names(adapter_names), requires_grad)

    delete_adapter = attach.delete_adapter

    disable_adapter_layers = disabling.disable
    enable_adapter_layers = disabling.enable
    disable_adapter = disabling.adapters_off

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if an adapter acts now."""
        return self._switch.enabled and bool(self._switch.active)

    # Into the weights and out again

    merge_adapter = merge.merge
    unmerge_adapter = merge.unmerge_adapters
    merge_and_unload = merge.merge_and_unload
    unload = merge.unload

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain model's. Raises ValueError if an adapter trains an embedding, whose tensors would not fit."""
        if args or kwargs:
            embeddings.check_resizable(self)
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    get_parameter = parameter_called

    def get_base_model(self) -> Any:
        """The model itself: here the adapted model and the base model are one object."""
        return self

    prepare_model_for_gradient_checkpointing = preparing.prepare_model_for_gradient_checkpointing
    supports_lora_conversion = preparing.supports_lora_conversion

    # Numbers

    get_nb_trainable_parameters = status.count_parameters
    print_trainable_parameters = status.print_parameters
    get_layer_status = status.get_layer_status
    get_model_status = status.get_model_status

    # Inside

    def _names(self, names: str | Sequence[str]) -> tuple[str, ...]:
        """One or several adapters' names as a tuple. Raises ValueError for an unknown adapter."""
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            config_of(self, name)
        return names


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


# By the last part of the names of transformers' classes.
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
    # Vision-language models also end in ForConditionalGeneration.
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

    A model that has adapters keeps them, but for one of the same name, which is replaced; a warning says so.

    Args:
        model: Any torch module; its NF4Linear layers make it QLoRA.
        peft_config: Held by the model itself, which fills in what it left open.
        mixed: Accepted for compatibility: adapters of all methods mix.
        autocast_adapter_dtype: Hold the adapter in float32 over a 16-bit or 4-bit model.
        low_cpu_mem_usage: Leave the adapter's tensors on the meta device until values are loaded.

    Raises ValueError when the config does not fit the model, TypeError for wrong types; `model` is then as before.
    """
    _check_config(peft_config)
    preparing.warn_of_adapters(model, adapter_name)
    becoming = _becoming_peft_model(model) if not isinstance(model, PeftModel) else contextlib.nullcontext()
    with preparing.reshaped(model, peft_config), becoming:
        if adapter_name in model.peft_config:
            attach.check_adapter(model, peft_config, adapter_name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the other adapter acts for a moment
                model.unmerge_adapter()
                model.delete_adapter(adapter_name)
        model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        model.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    if revision and peft_config.revision not in (None, revision):
        warnings.warn(
            f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision "
            f"{revision}",
            stacklevel=2,
        )
    named, name = peft_config.base_model_name_or_path, base_name(model)
    if named not in (None, name):
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{named}' to '{name}', which is the model "
            "that the adapter is for",
            PeftWarning,
            stacklevel=2,
        )
    peft_config.base_model_name_or_path = name
    peft_config.revision = revision or peft_config.revision
    return model


@contextlib.contextmanager
def _becoming_peft_model(model: Any) -> Iterator[None]:
    """Freeze `model` and mix `PeftModel` in; if the block that attaches the first adapter fails, undo both."""
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.requires_grad = False
    kind = _kind_of(model)
    mix_in(model, kind, paths.offers_to(model, kind))
    model.peft_config = {}
    model._switch = switch_of(model)
    model._targets, model._row_checks = {}, {}
    paths.become_backbone(model)
    preparing.tell_quantizer(model, attached=True)
    try:
        yield
    except BaseException:
        model.unload()
        for parameter, required in gradients:
            parameter.requires_grad = required
        raise


def _check_config(value: Any) -> None:
    if not isinstance(value, PeftConfig):
        name = f"{type(value).__module__}.{type(value).__name__}"
        raise TypeError(f"peft_config must be minipeft's LoraConfig or another of its configs, got {name}")
    if value.type_name is None:
        raise ValueError(f"{type(value).__name__} is the config of no registered method: see minipeft.methods.register")


def _check_free(model: AdaptedModel, adapter: str) -> None:
    if adapter in model.peft_config:
        raise ValueError(f"Adapter with name {adapter!r} already exists; delete it or take another name")

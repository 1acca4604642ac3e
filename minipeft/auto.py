"""Loading an adapter together with the base model that it was trained on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from minipeft.config import CONFIG_NAME, PeftConfig, TaskType
from minipeft.hub import HUB_ARGUMENTS, adapter_folder
from minipeft.model import PeftModel
from minipeft.public import attributes_of

# The names that PEFT's module of this name has besides.
__getattr__, __dir__ = attributes_of("auto")

# The files that a tokenizer of transformers may have, the one that each has first.
_TOKENIZER = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json"),
)
# The packages that a base model's class may come from, unless a caller names others.
_ALLOWED = ("diffusers", "transformers")

# Arguments of `from_pretrained` that are about the adapter alone.
_OF_THE_ADAPTER = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "torch_device")

# The classes of transformers whose `from_pretrained` makes the base model for a task.
_AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModel:
    """Loads an adapter together with the base model that its configuration names.

    This class goes by the configuration's `task_type`, or by the class that it says the base model had; the classes
    below are for one task each.
    """

    _task: ClassVar[TaskType | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model (`kwargs` go to transformers' `from_pretrained`) with the adapter attached.

        Where a tokenizer was saved beside the adapter, the base model's vocabulary grows to its size.

        Args:
            pretrained_model_name_or_path: The adapter's folder, or its name on the hub.
            revision, subfolder: Of the adapter; the base model's revision is in the configuration.
            import_allowlist: Packages that the base model's class may come from, if the configuration names a class.
            kwargs: How to reach the hub (`hub.HUB_ARGUMENTS`) is for both; `autocast_adapter_dtype`,
                `ephemeral_gpu_offload` and `torch_device` are for the adapter.

        Raises FileNotFoundError or ValueError as `PeftModel.from_pretrained`, and ValueError when the adapter does not
        say what its base model is, is for another task, or names a class outside of the allowed packages.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs} | {"revision": revision}
        # The base model's class would not know them.
        own = {name: kwargs.pop(name) for name in _OF_THE_ADAPTER if name in kwargs}
        source = str(pretrained_model_name_or_path)
        config = config or PeftConfig.from_pretrained(source, subfolder, **hub)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"the adapter at {source!r} names no base model; load the model yourself and use "
                "PeftModel.from_pretrained(model, adapter)"
            )
        base = cls._class_for(config, source, import_allowlist or _ALLOWED).from_pretrained(
            config.base_model_name_or_path, revision=config.revision or "main", **kwargs
        )
        _make_room_for_tokens(base, source, subfolder, hub, bool(kwargs.get("trust_remote_code")))
        return PeftModel.from_pretrained(
            base, source, adapter_name, is_trainable, config, subfolder=subfolder, **hub, **own
        )

    @classmethod
    def _class_for(cls, config: PeftConfig, source: str, allowed: Sequence[str]) -> Any:
        import transformers

        task = config.task_type
        if cls._task is not None and task is not None and task != cls._task:
            own = TaskType(task).value
            raise ValueError(f"the adapter at {source!r} is for {own}, {cls.__name__} for {cls._task.value}")
        named = config.auto_mapping or {}
        if task is None and named:
            return _named_class(named, source, allowed)
        if (task or cls._task) is None:
            raise ValueError(
                f"the adapter at {source!r} says neither its task_type nor the class of its base model; load the model "
                "yourself and use PeftModel.from_pretrained(model, adapter)"
            )
        return getattr(transformers, _AUTO_CLASSES[TaskType(task or cls._task)])


def _named_class(named: Mapping[str, Any], source: str, allowed: Sequence[str]) -> Any:
    """The class that an adapter's configuration says its base model had.

    Only of packages that are allowed: a file must not choose the code that is run.
    """
    library, name = named.get("parent_library") or "transformers", str(named.get("base_model_class"))
    if not any(f"{library}.".startswith(f"{package}.") for package in allowed):
        raise ValueError(
            f"the adapter at {source!r} names {library}.{name}, which is not in the import allowlist {[*allowed]}; if "
            "you trust that package, add it to import_allowlist"
        )
    found = getattr(importlib.import_module(library), name, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module) or not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"the adapter at {source!r} says that its base model is a {library}.{name}, which is no class of models; "
            "load the model yourself and use PeftModel.from_pretrained(model, adapter)"
        )
    return found


def _make_room_for_tokens(base: Any, source: str, subfolder: str | None, hub: Mapping[str, Any], trusted: bool) -> None:
    """Let the vocabulary of `base` grow to that of the tokenizer beside the adapter, if there is one and it is larger.

    A model may have more rows than its tokenizer has tokens: it never shrinks.
    """
    folder = adapter_folder(source, [CONFIG_NAME], _TOKENIZER[:1], subfolder, **hub)
    if not (folder / _TOKENIZER[0]).is_file() or not hasattr(base, "get_input_embeddings"):
        return
    from transformers import AutoTokenizer

    # From the folder: by its name, transformers would ask the hub for a model's files, too.
    folder = adapter_folder(source, [CONFIG_NAME], _TOKENIZER, subfolder, **hub)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For causal language models."""

    _task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoders."""

    _task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For classifiers of texts; the number of labels is among `kwargs` (`num_labels`)."""

    _task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For classifiers of tokens."""

    _task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For models that find answers in a text."""

    _task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models without a head."""

    _task = TaskType.FEATURE_EXTRACTION

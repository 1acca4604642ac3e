"""Loading an adapter together with the base model that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from minipeft.config import PeftConfig, TaskType
from minipeft.model import PeftModel
from minipeft.public import attributes_of

# The names that PEFT's module of this name has besides.
__getattr__, __dir__ = attributes_of("auto")

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
        **kwargs: Any,
    ) -> Any:
        """The base model (`kwargs` go to transformers' `from_pretrained`) with the adapter attached.

        Raises FileNotFoundError or ValueError as `PeftModel.from_pretrained`, and ValueError when the adapter does not
        say what its base model is, or is for another task.
        """
        config = config or PeftConfig.from_pretrained(pretrained_model_name_or_path)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"the adapter at {str(pretrained_model_name_or_path)!r} names no base model; load the model yourself "
                "and use PeftModel.from_pretrained(model, adapter)"
            )
        base = cls._class_for(config, str(pretrained_model_name_or_path)).from_pretrained(
            config.base_model_name_or_path, revision=revision or config.revision or "main", **kwargs
        )
        return PeftModel.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, config)

    @classmethod
    def _class_for(cls, config: PeftConfig, source: str) -> Any:
        import transformers

        task = cls._task or config.task_type
        if cls._task is not None and config.task_type is not None and config.task_type != cls._task:
            own = TaskType(config.task_type).value
            raise ValueError(f"the adapter at {source!r} is for {own}, {cls.__name__} for {cls._task.value}")
        if task is not None:
            return getattr(transformers, _AUTO_CLASSES[TaskType(task)])
        name = (config.auto_mapping or {}).get("base_model_class", "")
        # Only transformers' own classes: a file must not choose the code that is run.
        found = getattr(transformers, name, None)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
            raise ValueError(
                f"the adapter at {source!r} says neither its task_type nor a class of transformers (it says {name!r}); "
                "load the model yourself and use PeftModel.from_pretrained(model, adapter)"
            )
        return found


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

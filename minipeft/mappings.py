"""PEFT's tables of its methods, read from the one table of methods (`methods.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minipeft import model
from minipeft.config import PeftType, TaskType
from minipeft.methods import METHODS, Registration


class _ByType(Mapping[Any, Any]):
    """`peft_type` (a `PeftType` or its string) -> one part of the method, for the methods that have it.

    Methods that are registered later are there, too.
    """

    def __init__(self, part: str):
        self._part = part

    def _table(self) -> dict[str, Registration]:
        having = [method for method in METHODS.values() if getattr(method, self._part) is not None]
        # Several names may stand for one type: the first is the type's own.
        return {method.peft_type: method for method in reversed(having)}

    def __getitem__(self, peft_type: Any) -> Any:
        method = self._table()[peft_type]
        return getattr(method, self._part) if self._part == "prefix" else method.load(self._part)

    def __iter__(self) -> Iterator[Any]:
        known = {kind.value for kind in PeftType}
        return iter([PeftType(name) if name in known else name for name in reversed(self._table())])

    def __len__(self) -> int:
        return len(self._table())

    def __repr__(self) -> str:
        return repr(dict(self))


PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[Any, Any] = _ByType("config")
# The classes that PEFT wraps a model or its prompt in.
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[Any, Any] = _ByType("tuner")
# Adapters of all methods mix here, those of the methods that give the model virtual tokens included.
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: Mapping[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
# The start of the names of the adapters' tensors.
PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[Any, Any] = _ByType("prefix")

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type] = {
    TaskType.SEQ_CLS.value: model.PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: model.PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: model.PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: model.PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: model.PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: model.PeftModelForFeatureExtraction,
}

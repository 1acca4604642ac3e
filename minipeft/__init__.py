"""minipeft: parameter-efficient fine-tuning, written to be read and good enough to be used.

The names below are Hugging Face PEFT's, with its arguments; each is imported when it is first used.
"""

import importlib
from typing import Any

_HOME = {
    "BottleneckConfig": "minipeft.bottleneck.config",
    "PrefixTuningConfig": "minipeft.virtual.prefix",
    "initialize_kv_prefix_from_text": "minipeft.virtual.prefix",
    "PromptTuningConfig": "minipeft.virtual.prompt",
    "PromptTuningInit": "minipeft.virtual.prompt",
    "LoftQConfig": "minipeft.lora.config",
    "replace_lora_weights_loftq": "minipeft.lora.swap",
    "LoraConfig": "minipeft.lora.config",
    "LoraRuntimeConfig": "minipeft.lora.config",
    "create_loraplus_optimizer": "minipeft.lora.rates",
    "hotswap_adapter": "minipeft.lora.swap",
    "lora_plus_groups": "minipeft.lora.rates",
    "PeftConfig": "minipeft.config",
    "PeftType": "minipeft.config",
    "TaskType": "minipeft.config",
    "get_peft_config": "minipeft.config",
    "AutoPeftModel": "minipeft.auto",
    "AutoPeftModelForCausalLM": "minipeft.auto",
    "AutoPeftModelForFeatureExtraction": "minipeft.auto",
    "AutoPeftModelForQuestionAnswering": "minipeft.auto",
    "AutoPeftModelForSeq2SeqLM": "minipeft.auto",
    "AutoPeftModelForSequenceClassification": "minipeft.auto",
    "AutoPeftModelForTokenClassification": "minipeft.auto",
    "PeftModel": "minipeft.model",
    "PeftModelForCausalLM": "minipeft.model",
    "PeftModelForFeatureExtraction": "minipeft.model",
    "PeftModelForQuestionAnswering": "minipeft.model",
    "PeftModelForSeq2SeqLM": "minipeft.model",
    "PeftModelForSequenceClassification": "minipeft.model",
    "PeftModelForTokenClassification": "minipeft.model",
    "get_peft_model": "minipeft.model",
    "get_peft_model_state_dict": "minipeft.state",
    "inject_adapter_in_model": "minipeft.preparing",
    "load_peft_weights": "minipeft.directory",
    "PagedAdamW": "minipeft.optim",
    "prepare_model_for_kbit_training": "minipeft.preparing",
    "set_peft_model_state_dict": "minipeft.state",
    "get_layer_status": "minipeft.status",
    "get_model_status": "minipeft.status",
    "BitsAndBytesConfig": "minipeft.nf4",
    "NF4Config": "minipeft.nf4",
    "quantize_model": "minipeft.nf4",
}

__all__ = sorted(_HOME)

# Modules that are imported beside another one. Importing minipeft.nf4.hf lets transformers read 4-bit checkpoints, so
# that a script that uses adapters can load its base model.
_WITH = {"minipeft.auto": "minipeft.nf4.hf", "minipeft.model": "minipeft.nf4.hf"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    if _HOME[name] in _WITH:
        importlib.import_module(_WITH[_HOME[name]])
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""minipeft: parameter-efficient fine-tuning, written to be read and good enough to be used.

The names below are Hugging Face PEFT's, with its arguments; each is imported when it is first used.
"""

import importlib
from typing import Any

_HOME = {
    "BottleneckConfig": "minipeft.methods.bottleneck_config",
    "PrefixTuningConfig": "minipeft.methods.prefix",
    "initialize_kv_prefix_from_text": "minipeft.methods.prefix",
    "PromptTuningConfig": "minipeft.methods.prompt",
    "PromptTuningInit": "minipeft.methods.prompt",
    "LoftQConfig": "minipeft.methods.loftq",
    "replace_lora_weights_loftq": "minipeft.loftq_replace",
    "LoraConfig": "minipeft.methods.lora_config",
    "LoraRuntimeConfig": "minipeft.methods.lora_config",
    "create_loraplus_optimizer": "minipeft.methods.lora_plus",
    "hotswap_adapter": "minipeft.hotswap",
    "lora_plus_groups": "minipeft.methods.lora_plus",
    "PeftConfig": "minipeft.configs",
    "PeftType": "minipeft.configs",
    "TaskType": "minipeft.configs",
    "get_peft_config": "minipeft.configs",
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
    "get_peft_model_state_dict": "minipeft.state_dict",
    "inject_adapter_in_model": "minipeft.preparing",
    "load_peft_weights": "minipeft.checkpoint",
    "PagedAdamW": "minipeft.optim",
    "prepare_model_for_kbit_training": "minipeft.preparing",
    "set_peft_model_state_dict": "minipeft.state_dict",
    "get_layer_status": "minipeft.status",
    "get_model_status": "minipeft.status",
    "BitsAndBytesConfig": "minipeft.quantization",
    "NF4Config": "minipeft.quantization",
    "quantize_model": "minipeft.quantization",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Which of PEFT's names belong to methods that minipeft has, to methods that it has not, and which are only helpers."""

from __future__ import annotations

import re

# Config classes that a user of minipeft's methods meets.
OWN_CONFIGS = {
    "LoraConfig",
    "LoraRuntimeConfig",
    "LoftQConfig",
    "PeftConfig",
    "PeftConfigMixin",
    "PrefixTuningConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
}

# Packages of peft.tuners that are not a method of their own, or are one that minipeft has.
OWN_TUNERS = {"lora", "prefix_tuning", "prompt_tuning", "tuners_utils"}

# Modules of peft.tuners.lora that hold a variant that minipeft does not have.
VARIANT_MODULES = {
    "arrow",
    "corda",
    "eva",
    "kasa",
    "loraga",
    "monteclora",
    "velora",
    "bdlora",
    "intruders",
    "conversion",
}

# Fields of LoraConfig that ask for a variant that minipeft does not have (it refuses them by name).
VARIANT_FIELDS = {
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
}
# The same of its init_lora_weights.
VARIANT_STARTS = {"corda", "eva", "lora_ga", "mica", "olora"}

_FOREIGN = re.compile(
    r"PeftMixedModel|TrainableTokens\w*|PromptEncoder\w*|Monteclora\w*|Kasa\w*|ALora\w*|\w*alora_offsets\w*"
    r"|convert_to_lora|save_as_lora|BufferDict|\w*_corda|\w*Eva\w*|initialize_lora_eva_weights|get_eva_state_dict"
)


def is_foreign(module: str, name: str) -> bool:
    """Whether `name` of PEFT's module `module` belongs to a method or variant that minipeft does not have."""
    parts = module.split(".")
    if parts[0] != "peft":
        return False
    if parts[1:2] == ["tuners"] and len(parts) > 2:
        if parts[2] not in OWN_TUNERS:
            return True
        if parts[2] == "lora" and len(parts) > 3 and parts[3] in VARIANT_MODULES:
            return True
    if name.endswith("Config") and name not in OWN_CONFIGS:
        return True
    return _FOREIGN.fullmatch(name) is not None


def uses_foreign(value: object) -> bool:
    """Whether a test's parameter is, holds or asks for a method or variant that minipeft does not have."""
    if isinstance(value, list | tuple | set | frozenset):
        return any(uses_foreign(item) for item in value)
    if isinstance(value, dict):
        fields = any(isinstance(k, str) and k in VARIANT_FIELDS and v not in (None, False) for k, v in value.items())
        start = value.get("init_lora_weights")
        return fields or (isinstance(start, str) and start in VARIANT_STARTS) or uses_foreign(list(value.values()))
    kind = value if isinstance(value, type) else type(value)
    if any(is_foreign(c.__module__ or "", c.__name__) for c in kind.__mro__[:1]):
        return True
    if not isinstance(value, type) and type(value).__name__ == "LoraConfig":
        return uses_foreign({k: v for k, v in vars(value).items() if k in VARIANT_FIELDS or k == "init_lora_weights"})
    return False

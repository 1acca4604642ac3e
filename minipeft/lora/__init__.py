"""LoRA and its variants (Hu et al. 2021), over dense and over 4-bit weights."""

import dataclasses

from minipeft.methods import Registration

_LORA = Registration(
    "lora",
    peft_type="LORA",
    config="minipeft.lora.config:LoraConfig",
    attach="minipeft.lora.find:LORA",
    train_defaults={"target_modules": "all-linear"},
    # The learning rate is the best of those tried on the demo's task, see docs/comparison.md.
    compare_defaults={"lr": 1e-3, "method_args": {"r": 16, "lora_alpha": 32}},
    rows="minipeft.lora.rows:check_rows",
    names="minipeft.lora.old_experts:name_experts",
    trains="minipeft.lora.old_experts:take_experts",
    files="minipeft.lora.old_files:of_today",
    combine="minipeft.lora.combine:add_weighted_adapter",
    rates="minipeft.lora.rates:lora_plus_groups",
    prefix="lora_",
    tuner="minipeft.lora.wrapper:LoraModel",
)

METHODS = (_LORA, dataclasses.replace(_LORA, name="qlora", settings={"quantize": "nf4"}))

"""Virtual tokens: prefix tuning (Li and Liang 2021) and prompt tuning (Lester et al. 2021)."""

from minipeft.methods import Registration

# PEFT's model with virtual tokens has these besides.
_ATTRIBUTES = {"prompt_encoder": "minipeft.virtual.tokens:prompt_encoders"}

# The learning rates are the best of those tried on the demo's task, see docs/comparison.md.
METHODS = (
    Registration(
        "prefix",
        peft_type="PREFIX_TUNING",
        config="minipeft.virtual.prefix:PrefixTuningConfig",
        attach="minipeft.virtual.prefix:PREFIXES",
        tuner="minipeft.virtual.prefix:PrefixEncoder",
        attributes=_ATTRIBUTES,
        # A random start learns little: see `start_from_tokens`.
        train_defaults={"num_virtual_tokens": 20},
        compare_defaults={"lr": 1e-2, "method_args": {"num_virtual_tokens": 20}},
        start="minipeft.virtual.prefix:start_from_tokens",
    ),
    Registration(
        "prompt",
        peft_type="PROMPT_TUNING",
        config="minipeft.virtual.prompt:PromptTuningConfig",
        attach="minipeft.virtual.prompt:PROMPTS",
        tuner="minipeft.virtual.prompt:PromptEncoder",
        attributes=_ATTRIBUTES,
        train_defaults={"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
        compare_defaults={"lr": 3e-2, "method_args": {"num_virtual_tokens": 20}},
    ),
)

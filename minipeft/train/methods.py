"""What a `--method` stands for: a config class with our defaults, how it is attached, and where it starts.

Heavy imports are made inside the functions: a command line looks at the names alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable
from typing import Any

from minipeft.train.config import TrainConfig, setting_names
from minipeft.train.errors import ConfigError, TrainingError, as_user_error


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a `--method` stands for: a config class, our defaults for its arguments, other settings of the run."""

    config: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)


METHODS = {
    "lora": Choice("LoraConfig", {"target_modules": "all-linear"}),
    "qlora": Choice("LoraConfig", {"target_modules": "all-linear"}, {"quantize": "nf4"}),
    "bottleneck": Choice("BottleneckConfig"),
    # Random starts learn little; see `start` for the prefix's, and `method_config` for one with a projection.
    "prefix": Choice("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "prompt": Choice("PromptTuningConfig", {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}),
}


class AdapterError(TrainingError, ValueError):
    """An adapter that cannot be attached, loaded or merged."""


def method_config(config: TrainConfig) -> Any:
    """The adapter's config: `method_args` over our defaults.

    Raises:
        ConfigError: an argument that the method does not have, or a value it refuses.
    """
    import minipeft

    _check_arguments(config)
    choice = METHODS[config.method]
    arguments = {**choice.arguments, "task_type": "CAUSAL_LM", **config.method_args}
    if choice.config == "PromptTuningConfig" and "prompt_tuning_init_text" in arguments:
        arguments.update(prompt_tuning_init="TEXT", tokenizer_name_or_path=str(config.model))
    if arguments.get("prefix_projection"):
        # What the projection gives cannot be started from a text.
        arguments.setdefault("init_weights", "zero")
    with as_user_error(ConfigError, "method_args"):
        return getattr(minipeft, choice.config)(**arguments)


def method_arguments(method: str) -> list[str]:
    """The names of the arguments that a method's config makes use of."""
    import minipeft

    config = getattr(minipeft, METHODS[method].config)
    # What every adapter's file has, and what of PEFT's there is not, is taken where it asks for nothing.
    idle = {f.name for f in dataclasses.fields(minipeft.PeftConfig)} | set(config.unsupported)
    return [f.name for f in dataclasses.fields(config) if f.name not in idle]


def _check_arguments(config: TrainConfig) -> None:
    import minipeft

    name_of_config = METHODS[config.method].config
    taken = [f.name for f in dataclasses.fields(getattr(minipeft, name_of_config))]
    for name in config.method_args:
        if name in taken:
            continue
        if name in setting_names():
            raise ConfigError(f"method_args: {name!r} is a setting of the run: write it beside method_args, not in it")
        known = method_arguments(config.method)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
        raise ConfigError(f"method_args: {name_of_config} has no argument {name!r}; {hint}")
    if config.method_args.get("inference_mode"):
        raise ConfigError("method_args: an adapter in inference_mode is not trained: leave it out")


def check_settings(config: TrainConfig) -> Any:
    """The adapter's config, once all that needs no model is known to be right: see `method_config`.

    Raises:
        ConfigError: arguments that the method, the optimizer or the schedule refuses.
        MissingExtraError: an optional package that was asked for and is not installed.
    """
    import torch

    from minipeft.train.report import check_matplotlib, check_tensorboard
    from minipeft.train.schedule import make_optimizer, make_schedule

    if config.plot:
        check_matplotlib()
    if config.tensorboard:
        check_tensorboard()
    if config.loraplus_lr_ratio is not None and METHODS[config.method].config != "LoraConfig":
        raise ConfigError(f"loraplus_lr_ratio is for LoRA, and the method is {config.method}")
    # Any parameters and length will do: only the arguments are looked at.
    plain = dataclasses.replace(config, loraplus_lr_ratio=None)
    optimizer = make_optimizer(torch.nn.Linear(1, 1), plain)
    try:
        make_schedule(optimizer, config, total_steps=100)
    finally:
        getattr(optimizer, "close", lambda: None)()
    return method_config(config)


def attach(model: Any, adapter_config: Any) -> Any:
    """`get_peft_model`, with its refusals (such as names that match no module) as AdapterError."""
    from minipeft import get_peft_model, prepare_model_for_kbit_training

    with as_user_error(AdapterError):
        if is_packed(model):
            # Checkpointing is the Trainer's to switch on.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return get_peft_model(model, adapter_config)


def start(model: Any, data: Any, say: Callable[[str], None] = print) -> None:
    """Start a prefix from the keys and values of the data's first tokens, unless its arguments say another start."""
    config = model.peft_config["default"]
    if config.peft_type.value != "PREFIX_TUNING" or config.init_weights or config.prefix_projection:
        return
    import torch

    from minipeft import initialize_kv_prefix_from_text

    tokens = itertools.chain.from_iterable(example.input_ids for example in data.examples)
    ids = list(itertools.islice(itertools.cycle(tokens), config.num_virtual_tokens))
    with as_user_error(AdapterError):
        initialize_kv_prefix_from_text(model, text=torch.tensor(ids))
    say(f"the prefix starts from the first {len(ids)} tokens of the data")


def is_packed(model: Any) -> bool:
    """Whether the model's weights are in NF4."""
    from minipeft.nf4 import NF4Linear

    return any(isinstance(module, NF4Linear) for module in model.modules())

"""From a `--method` and its arguments to an adapter on a model, by the table of methods.

Heavy imports are made inside the functions: a command line reads the names alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from minipeft.config import PeftConfig
from minipeft.methods import METHODS, method_of
from minipeft.train.config import TrainConfig, setting_names
from minipeft.train.errors import ConfigError, TrainingError, as_user_error


class AdapterError(TrainingError, ValueError):
    """An adapter that cannot be attached, loaded or merged."""


def method_config(config: TrainConfig) -> Any:
    """The adapter's config: `method_args` over the method's defaults for training, or that of the adapter to train on.

    Raises:
        ConfigError: an argument that the method does not have, or a value it refuses; an adapter of another method.
        AdapterError: no adapter there.
    """
    method = METHODS[config.method]
    if config.adapter is not None:
        return _stored_config(config.adapter, config.method, config.method_args)
    _check_arguments(config)
    config_class = method.load("config")
    arguments = {**method.train_defaults, "task_type": "CAUSAL_LM", **config.method_args}
    with as_user_error(ConfigError, "method_args"):
        return config_class(**config_class.completed(arguments, str(config.model)))


def _stored_config(adapter: str, method: str, method_args: Mapping[str, Any]) -> PeftConfig:
    with as_user_error(AdapterError, adapter):
        stored = PeftConfig.from_pretrained(adapter)
    if method_args:
        raise ConfigError(f"method_args {dict(method_args)} cannot change {adapter}, which is trained further")
    if METHODS[method].peft_type != stored.type_name:
        fitting = [name for name, other in METHODS.items() if other.peft_type == stored.type_name]
        raise ConfigError(f"the adapter {adapter} is a {stored.type_name}: take --method {' or '.join(fitting)}")
    return stored


def method_arguments(method: str) -> list[str]:
    """The names of the arguments that a method's config makes use of."""
    config_class = METHODS[method].load("config")
    # Skip the common fields, which no user sets, and PEFT's fields that minipeft lacks.
    idle = {f.name for f in dataclasses.fields(PeftConfig)} | set(config_class.unsupported)
    return [f.name for f in dataclasses.fields(config_class) if f.name not in idle]


def _check_arguments(config: TrainConfig) -> None:
    config_class = METHODS[config.method].load("config")
    taken = [f.name for f in dataclasses.fields(config_class)]
    for name in config.method_args:
        if name in taken:
            continue
        if name in setting_names():
            raise ConfigError(f"method_args: {name!r} is a setting of the run: write it beside method_args, not in it")
        known = method_arguments(config.method)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
        raise ConfigError(f"method_args: {config_class.__name__} has no argument {name!r}; {hint}")
    if config.method_args.get("inference_mode"):
        raise ConfigError("method_args: an adapter in inference_mode is not trained: leave it out")


def check_settings(config: TrainConfig) -> Any:
    """The adapter's config (`method_config`), after checking every setting that can be checked without the model.

    Raises:
        ConfigError: arguments that the method, the optimizer or the schedule refuses.
        MissingExtraError: an optional package that was asked for and is not installed.
    """
    import torch

    from minipeft.train.report import check_matplotlib
    from minipeft.train.schedule import make_optimizer, make_schedule
    from minipeft.train.trackers import check_trackers

    if config.plot:
        check_matplotlib()
    check_trackers(config.trackers())
    if config.loraplus_lr_ratio is not None and METHODS[config.method].rates is None:
        raise ConfigError(f"loraplus_lr_ratio is for LoRA, and the method is {config.method}")
    # Any parameters and length will do: only the arguments are checked.
    plain = dataclasses.replace(config, loraplus_lr_ratio=None)
    optimizer = make_optimizer(torch.nn.Linear(1, 1), plain)
    try:
        make_schedule(optimizer, config, total_steps=100)
    finally:
        getattr(optimizer, "close", lambda: None)()
    return method_config(config)


def attach(model: Any, adapter_config: Any, adapter: str | None = None) -> Any:
    """The model with a new adapter or, to be trained further, with that in the directory `adapter`.

    Raises:
        AdapterError: names that match no module and the like; an adapter that does not fit.
    """
    from minipeft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    with as_user_error(AdapterError):
        if is_packed(model):
            # The Trainer switches checkpointing on.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if adapter is not None:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
        complete = method_of(adapter_config.type_name).load("trains")
        if complete is not None:
            complete(model, adapter_config)
        return get_peft_model(model, adapter_config)


def start(model: Any, data: Any, say: Callable[[str], None] = print) -> None:
    """Give a new adapter its method's start from the training data, if it has one, and say so."""
    give_start = method_of(model.peft_config["default"].type_name).load("start")
    if give_start is None:
        return
    with as_user_error(AdapterError):
        notice = give_start(model, itertools.chain.from_iterable(example.input_ids for example in data.examples))
    if notice is not None:
        say(notice)


def is_packed(model: Any) -> bool:
    """True if some of the model's weights are in NF4."""
    from minipeft.packed import Packed

    return any(isinstance(module, Packed) for module in model.modules())

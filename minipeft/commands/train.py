"""`minipeft train`: fine-tune on records and save the adapter."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipeft.commands.arguments import check_device, check_output_path
from minipeft.methods import METHODS
from minipeft.stored import naming, shown
from minipeft.train.config import TrainConfig, config_values
from minipeft.train.errors import ConfigError, TrainingError, as_user_error
from minipeft.train.methods import AdapterError, attach, check_settings, start

if TYPE_CHECKING:
    from minipeft.train.processes import Processes

logger = logging.getLogger(__name__)

# The exit code of bad input (`cli.USER_ERROR`).
FAILED = 2


def train(args: argparse.Namespace) -> int:
    """`minipeft train`: fine-tune on records and save the adapter; with torchrun in several processes.

    Returns the exit code: of several processes, those that have nothing more to say about an error end in silence.
    """
    try:
        config = train_config(args)
    except TrainingError:
        if int(os.environ.get("RANK", 0)) > 0:
            return FAILED  # the first process was given the same settings, and says so
        raise
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _train(config, args, None)
        return 0
    # Before torch is imported: of each step its C++ code would say that all of an adapter was reached.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from minipeft.train.processes import join, own_device

    processes = join(config.process_timeout)
    if config.device == "auto":
        config.device = own_device()
    try:
        with contextlib.ExitStack() as quiet:
            if not processes.first:
                quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
                quiet.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
            _train(config, args, processes)
    except Exception as error:
        if processes.speaks(str(error)):
            raise
        return getattr(error, "exit_code", FAILED)
    finally:
        processes.leave()
    return 0


def _train(config: TrainConfig, args: argparse.Namespace, processes: Processes | None) -> None:
    resume = args.resume
    check_output_path(Path(config.output_dir), may_exist=True)
    check_device(config.device)

    from minipeft import quantized_sizes
    from minipeft.train import (
        Trainer,
        check_output_dir,
        load_base_model,
        load_tokenizer,
        pad_id_of,
        prepare_data,
        seed_everything,
    )
    from minipeft.train.models import text_positions, without_bars
    from minipeft.train.pushing import check_login
    from minipeft.train.run import check_not_running

    if processes is None or processes.first:
        check_not_running(Path(config.output_dir))
        check_output_dir(config.output_dir, resume)
    # Without flags, what is wrong with a setting is wrong with the file.
    with naming(f"config file {args.config}") if args.config and not _flags(args) else contextlib.nullcontext():
        adapter_config = check_settings(config)
    if config.push_to_hub is not None and args.show_data is None and (processes is None or processes.first):
        check_login(config.push_to_hub)
    tokenizer = load_tokenizer(config.model, config.chat_template)
    data, eval_data = prepare_data(config, tokenizer, *text_positions(config.model, adapter_config))
    for notice in data.notices:
        print(notice)
    print(f"{len(data)} records, {data.tokens:,} tokens, of which {data.loss_tokens:,} are learned")
    if args.show_data is not None:
        for number, example in enumerate(data.examples[: args.show_data], 1):
            print(f"\n--- {number}: {len(example)} tokens, {example.loss_tokens} learned: between >>> and <<<")
            print(example.shown(tokenizer))
        return
    sharded = config.fsdp and processes is not None
    if config.fsdp and not sharded:
        logger.warning("fsdp: this process is alone, and holds all of the model (start several: torchrun)")
    device = "cpu" if sharded else config.device
    with without_bars():
        model = load_base_model(config.model, quantize=config.quantize, dtype=config.dtype, device=device)
    if config.quantize:
        print(quantized_sizes(model))
    seed_everything(config.seed)
    model = attach(model, adapter_config, config.adapter)
    if config.adapter is None:
        start(model, data)
    model.print_trainable_parameters()
    if sharded:
        from minipeft.train.processes import shard

        shard(model, config.device)
    trainer = Trainer(model, data, config, eval_data=eval_data, pad_id=pad_id_of(tokenizer), processes=processes)
    result = trainer.train(resume=resume)
    print(f"trained {result.steps} steps, {result.tokens:,} tokens, in {result.seconds:.0f} s; loss {result.loss:.4f}")
    if result.eval_end is not None:
        print(f"evaluation: {result.eval_end}")
    print(f"adapter saved in {result.adapter_dir}")
    quantize = f" --quantize {config.quantize}" if config.quantize else ""
    # A model that learned plain texts must be given plain prompts, without the chat template.
    raw = "" if data.chat else " --raw"
    if data.chat and config.chat_template is not None:
        raw = f" --chat-template {config.chat_template}"
    print(
        f"use it: minipeft generate --model {config.model}{quantize} --adapter {result.adapter_dir}{raw} --prompt '...'"
    )
    if config.push_to_hub is not None:
        print(f"uploaded to {config.push_to_hub}")


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags give, but for the places of data, model and results."""
    return {k: v for k, v in config_values(args).items() if k not in ("model", "data", "output_dir")}


def _base_of(adapter: str) -> str:
    from minipeft import PeftConfig

    with as_user_error(AdapterError, adapter):
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ConfigError(f"--model {adapter} is an adapter that names no base model: give --model and --adapter")
    return base


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The run's settings: YAML, then flags; `qlora` spelled out.

    Raises:
        ConfigError: see `TrainConfig.from_sources`; an unknown method.
    """
    config = TrainConfig.from_sources(args.config, config_values(args))
    held = [name for name in ("adapter_config.json", "config.json") if (Path(config.model) / name).is_file()]
    if config.adapter is None and held == ["adapter_config.json"]:
        # As TRL: the model is an adapter, which knows its base.
        config.adapter, config.model = config.model, _base_of(config.model)
    if config.method not in METHODS:
        where = f"config file {args.config}: " if args.config and "method" not in config_values(args) else ""
        raise ConfigError(f"{where}unknown method {shown(config.method)}: known methods are {', '.join(METHODS)}")
    for name, value in METHODS[config.method].settings.items():
        setattr(config, name, value)
    return config

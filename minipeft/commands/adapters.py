"""`minipeft eval`, `generate` and `merge`: what is done with a base model and a trained adapter."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipeft.commands.arguments import check_adapter_path, check_device, check_output_path
from minipeft.train.errors import ConfigError, as_user_error
from minipeft.train.methods import AdapterError, is_packed


def evaluate(args: argparse.Namespace) -> None:
    """`minipeft eval`: loss and perplexity on records."""
    from minipeft.train import (
        Batches,
        encode_records,
        evaluate_loss,
        load_tokenizer,
        pad_id_of,
        read_records,
        resolve_max_length,
    )
    from minipeft.train.models import text_positions

    records = read_records(args.data)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    max_length = resolve_max_length(args.max_length, *text_positions(args.model, read_adapter(args)))
    data = encode_records(records, tokenizer, max_length, args.too_long)
    for notice in data.notices:
        print(notice)
    model = load_model(args)
    # Alike in length, so that little is padded.
    examples = sorted(data.examples, key=len)
    result = evaluate_loss(model, Batches(examples, args.batch_size, pad_id=pad_id_of(tokenizer)))
    print(f"{result} over {result.tokens:,} learned tokens of {len(data)} records")


def generate(args: argparse.Namespace) -> None:
    """`minipeft generate`: continue a prompt."""
    from minipeft.train import load_tokenizer, seed_everything
    from minipeft.train.generation import check_fits, prompt_ids, sampling_config
    from minipeft.train.generation import generate as generate_text
    from minipeft.train.models import text_positions

    with as_user_error(ConfigError):
        sampling = sampling_config(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
        tokenizer = load_tokenizer(args.model, args.chat_template)
        ids = prompt_ids(tokenizer, read_prompt(args.prompt), raw=args.raw, system=args.system)
        limit, virtual = text_positions(args.model, read_adapter(args))
        check_fits(limit, ids, sampling, virtual)
    model = load_model(args)
    seed_everything(args.seed)
    text = generate_text(model, tokenizer, [ids], sampling, stream=args.stream)[0]
    if not args.stream:
        print(text)


def merge(args: argparse.Namespace) -> None:
    """`minipeft merge`: fold an adapter into its base model and save an ordinary model folder.

    Raises:
        ConfigError: --requantize without a 4-bit base.
        OutputDirError, ModelLoadError, AdapterError: a place, model or adapter that cannot be used.
    """
    output = Path(args.output)
    check_output_path(output, may_exist=False)

    from minipeft.files import atomic_directory
    from minipeft.train import load_tokenizer
    from minipeft.train.generation import end_ids
    from minipeft.train.models import without_bars

    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = load_model(args)
    packed = is_packed(model)
    if args.requantize and not packed:
        raise ConfigError("--requantize needs a 4-bit base: add --quantize nf4, or give a 4-bit model folder")
    # Its log says what became of the weights; the lines printed below say it too, with the place of the result.
    with as_user_error(AdapterError), _silent_log():
        model = model.merge_and_unload(requantize=args.requantize)
    # So that whoever generates with the folder alone stops where training ended its texts.
    model.generation_config.eos_token_id = end_ids(model, tokenizer) or None
    with atomic_directory(output) as temporary, without_bars():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    if args.requantize:
        print(f"merged in NF4: {output}")
        print("The merged weights were rounded to 4 bits again: updates smaller than half a step of NF4 are lost. So")
        print("compare it with the adapter by minipeft eval, or merge in 16 bits, without --requantize.")
    else:
        bits = {"torch.bfloat16": "16-bit", "torch.float16": "16-bit", "torch.float32": "32-bit"}
        dtype = str(model.dtype)
        print(f"merged in {bits.get(dtype, '')} ({dtype.removeprefix('torch.')}): {output}")
    first = "from minipeft import NF4Config; " if args.requantize else ""  # transformers then reads it by itself
    print(f"use it: {first}AutoModelForCausalLM.from_pretrained({str(output)!r})")


def load_model(args: argparse.Namespace) -> Any:
    """The base model that `args` name, with its adapter where one is given.

    Raises:
        ModelLoadError: no such model.
        AdapterError: see `read_adapter`; an adapter that is damaged or does not fit the model.
    """
    from minipeft.train import load_base_model
    from minipeft.train.models import without_bars

    check_device(args.device)
    read_adapter(args)
    with without_bars():
        model = load_base_model(args.model, quantize=args.quantize, dtype=args.dtype, device=args.device)
    if args.adapter is None:
        return model
    from minipeft import PeftModel

    with as_user_error(AdapterError, str(args.adapter)):
        return PeftModel.from_pretrained(model, args.adapter)


def read_adapter(args: argparse.Namespace) -> Any:
    """The config of the adapter that `args` name, or None.

    Models of one shape differ in nothing that could be checked: on the wrong one an adapter gives nonsense. So it must
    have been trained on a model of the same name, unless `--any-base` says that all is well.

    Raises:
        AdapterError: no adapter there, or one that was trained on a model of another name.
    """
    if args.adapter is None:
        return None
    from minipeft import PeftConfig
    from minipeft.hub import base_names

    adapter = Path(args.adapter)
    check_adapter_path(adapter)
    with as_user_error(AdapterError, str(adapter)):
        config = PeftConfig.from_pretrained(adapter)
    trained_on = config.base_model_name_or_path
    if trained_on and not args.any_base and base_names(trained_on).isdisjoint(base_names(args.model)):
        raise AdapterError(
            f"{adapter} was trained on {trained_on!r}, and --model is {args.model!r}; if that is the same model under "
            "another name, add --any-base"
        )
    return config


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for "-"; ConfigError if that is not UTF-8 text."""
    if prompt != "-":
        return prompt
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:
        return sys.stdin.read()
    try:
        return buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompt -: standard input is not UTF-8 text: {error.reason}") from None


@contextlib.contextmanager
def _silent_log() -> Iterator[None]:
    logger = logging.getLogger("minipeft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

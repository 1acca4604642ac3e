"""What the subcommands of `minipeft` do. Each takes parsed arguments, prints its result and returns nothing.

Checks come in the order of their cost: paths and settings, then data, then the model. Heavy imports are made
inside the functions, so that `minipeft --help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipeft.training.config import TrainConfig, config_values
from minipeft.training.errors import ConfigError, OutputDirError, TrainingError
from minipeft.training.quiet import without_bars


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
    # Random starts learn little; see `start` for the prefix's.
    "prefix": Choice("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "prompt": Choice("PromptTuningConfig", {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}),
}


class AdapterError(TrainingError, ValueError):
    """An adapter that cannot be attached, loaded or merged."""


class KernelsError(TrainingError, ValueError):
    """A target that cannot be compiled for, or a compiler or peer that is not there."""


def train(args: argparse.Namespace) -> None:
    """`minipeft train`: fine-tune on a JSONL file and save the adapter."""
    config = train_config(args)
    resume = args.resume
    check_output_path(Path(config.output_dir), may_exist=True)
    check_device(config.device)

    from minipeft.training import (
        Trainer,
        check_output_dir,
        load_base_model,
        load_position_limit,
        load_tokenizer,
        pad_id_of,
        prepare_data,
        seed_everything,
    )
    from minipeft.training.rundir import check_not_running

    check_not_running(Path(config.output_dir))
    check_output_dir(config.output_dir, resume)
    check_extras(config)
    adapter_config = method_config(config)
    tokenizer = load_tokenizer(config.model)
    data, eval_data = prepare_data(config, tokenizer, load_position_limit(config.model))
    for notice in data.notices:
        print(notice)
    print(f"{len(data)} records, {data.tokens:,} tokens, of which {data.loss_tokens:,} are learned")
    with without_bars():
        model = load_base_model(config.model, quantize=config.quantize, dtype=config.dtype, device=config.device)
    seed_everything(config.seed)
    model = attach(model, adapter_config)
    start(model, data)
    model.print_trainable_parameters()
    trainer = Trainer(model, data, config, eval_data=eval_data, pad_id=pad_id_of(tokenizer))
    result = trainer.train(resume=resume)
    print(f"trained {result.steps} steps, {result.tokens:,} tokens, in {result.seconds:.0f} s; loss {result.loss:.4f}")
    if result.eval_end is not None:
        print(f"evaluation: {_loss_text(result.eval_end)}")
    print(f"adapter saved in {result.adapter_dir}")
    quantize = f" --quantize {config.quantize}" if config.quantize else ""
    print(f"use it: minipeft generate --model {config.model}{quantize} --adapter {result.adapter_dir} --prompt '...'")


def evaluate(args: argparse.Namespace) -> None:
    """`minipeft eval`: loss and perplexity on a JSONL file."""
    from minipeft.training import (
        Batches,
        encode_records,
        evaluate_loss,
        load_position_limit,
        load_tokenizer,
        pad_id_of,
        read_jsonl,
        resolve_max_length,
    )

    records = read_jsonl(args.data)
    tokenizer = load_tokenizer(args.model)
    max_length = resolve_max_length(args.max_length, load_position_limit(args.model))
    data = encode_records(records, tokenizer, max_length, args.too_long)
    for notice in data.notices:
        print(notice)
    model = load_model(args)
    # Alike in length, so that little is padded.
    examples = sorted(data.examples, key=len)
    result = evaluate_loss(model, Batches(examples, args.batch_size, pad_id=pad_id_of(tokenizer)))
    print(f"{_loss_text(result)} over {result.tokens:,} learned tokens of {len(data)} records")


def generate(args: argparse.Namespace) -> None:
    """`minipeft generate`: continue a prompt."""
    from minipeft.training import load_position_limit, load_tokenizer, seed_everything
    from minipeft.training.generation import Sampling, check_fits, prompt_ids
    from minipeft.training.generation import generate as generate_text

    with as_user_error(ConfigError):
        sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)
        tokenizer = load_tokenizer(args.model)
        ids = prompt_ids(tokenizer, read_prompt(args.prompt), raw=args.raw, system=args.system)
        check_fits(load_position_limit(args.model), ids, sampling)
    model = load_model(args)
    seed_everything(args.seed)
    text = generate_text(model, tokenizer, [ids], sampling, stream=args.stream)[0]
    if not args.stream:
        print(text)


def merge(args: argparse.Namespace) -> None:
    """`minipeft merge`: fold an adapter into its base model and save an ordinary model folder."""
    output = Path(args.output)
    check_output_path(output, may_exist=False)

    from minipeft.training import load_tokenizer
    from minipeft.training.directories import atomic_directory

    tokenizer = load_tokenizer(args.model)
    model = load_model(args)
    packed = is_packed(model)
    if args.requantize and not packed:
        raise ConfigError("--requantize needs a 4-bit base: add --quantize nf4, or give a 4-bit model folder")
    # It logs what became of the weights; so do we, with the place where they are.
    with as_user_error(AdapterError), _silent_log():
        model = model.merge_and_unload(requantize=args.requantize)
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


def inspect(args: argparse.Namespace) -> None:
    """`minipeft inspect`: say what a directory holds."""
    from minipeft.training.inspection import describe

    print(describe(args.path))


def demo(args: argparse.Namespace) -> None:
    """`minipeft demo`: the whole job on a small real model."""
    check_output_path(Path(args.output), may_exist=False)

    from minipeft.training.demo import DemoConfig, run_demo

    run_demo(DemoConfig(output=Path(args.output), model=args.model, data=args.data, steps=args.steps, seed=args.seed))


def kernels(args: argparse.Namespace) -> None:
    """`minipeft kernels`: the machine code of the GPU kernels, compiled here."""
    options = ["--target", args.target, "--dtype", args.dtype]
    options += ["--against", args.against] if args.against else []
    options += ["--json", args.json] if args.json else []
    try:
        from minipeft.kernels.offline import main

        print(main(options), end="")
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise KernelsError(str(error)) from error


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The run's settings: YAML, then flags; `qlora` spelled out.

    Raises:
        ConfigError: see `TrainConfig.from_sources`; an unknown method.
    """
    config = TrainConfig.from_sources(args.config, config_values(args))
    if config.method not in METHODS:
        raise ConfigError(f"unknown method {config.method!r}: known methods are {', '.join(METHODS)}")
    for name, value in METHODS[config.method].settings.items():
        setattr(config, name, value)
    return config


def method_config(config: TrainConfig) -> Any:
    """The adapter's config: `method_args` over our defaults.

    Raises:
        ConfigError: an argument that the method does not have, or a value it refuses.
    """
    import minipeft

    choice = METHODS[config.method]
    arguments = {**choice.arguments, "task_type": "CAUSAL_LM", **config.method_args}
    if choice.config == "PromptTuningConfig" and "prompt_tuning_init_text" in arguments:
        arguments.update(prompt_tuning_init="TEXT", tokenizer_name_or_path=str(config.model))
    with as_user_error(ConfigError, "method_args"):
        return getattr(minipeft, choice.config)(**arguments)


def check_extras(config: TrainConfig) -> None:
    """Raise for optional packages that are not there and a schedule's bad arguments, before the model is loaded."""
    import torch

    from minipeft.training.metrics import check_tensorboard
    from minipeft.training.plots import check_matplotlib
    from minipeft.training.schedule import make_schedule

    if config.plot:
        check_matplotlib()
    if config.tensorboard:
        check_tensorboard()
    # Any optimizer and length will do: only the arguments are looked at.
    make_schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr), config, total_steps=100)


def attach(model: Any, adapter_config: Any) -> Any:
    """`get_peft_model`, with its refusals (such as names that match no module) as AdapterError."""
    from minipeft import get_peft_model, prepare_model_for_kbit_training

    with as_user_error(AdapterError):
        if is_packed(model):
            # Checkpointing is the Trainer's to switch on.
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return get_peft_model(model, adapter_config)


def start(model: Any, data: Any) -> None:
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
    print(f"the prefix starts from the first {len(ids)} tokens of the data")


def load_model(args: argparse.Namespace) -> Any:
    """The base model that `args` name, with its adapter where one is given.

    Raises:
        ModelLoadError: no such model.
        AdapterError: no adapter there, a damaged one, or one that was trained on another model.
    """
    from minipeft.training import load_base_model

    check_device(args.device)
    if args.adapter is not None:
        check_adapter_path(Path(args.adapter))
        check_base(Path(args.adapter), args.model, args.any_base)
    with without_bars():
        model = load_base_model(args.model, quantize=args.quantize, dtype=args.dtype, device=args.device)
    if args.adapter is None:
        return model
    from minipeft import PeftModel

    with as_user_error(AdapterError, str(args.adapter)):
        return PeftModel.from_pretrained(model, args.adapter)


def check_base(adapter: Path, model: str, any_base: bool) -> None:
    """Raise AdapterError when the adapter says that it was trained on a model of another name, unless `any_base`.

    Models of one shape differ in nothing that could be checked: on the wrong one an adapter gives nonsense.
    """
    from minipeft import PeftConfig

    with as_user_error(AdapterError, str(adapter)):
        trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if trained_on and not any_base and Path(trained_on).name != Path(model).resolve().name:
        raise AdapterError(
            f"{adapter} was trained on {trained_on!r}, and --model is {model!r}; if that is the same model under "
            "another name, add --any-base"
        )


def check_device(device: str) -> None:
    """Raise ConfigError for a device that there is not."""
    from minipeft.training import resolve_device

    with as_user_error(ConfigError):
        resolve_device(device)


def is_packed(model: Any) -> bool:
    """Whether the model's weights are in NF4."""
    from minipeft.quantization import NF4Linear

    return any(isinstance(module, NF4Linear) for module in model.modules())


def check_adapter_path(path: Path) -> None:
    """Raise AdapterError now rather than after the base model is loaded."""
    if not (path / "adapter_config.json").is_file():
        inner = path / "adapter"
        hint = f"; there is one in {inner}" if (inner / "adapter_config.json").is_file() else ""
        raise AdapterError(f"no adapter at {path}: expected a directory with adapter_config.json{hint}")


def check_output_path(path: Path, *, may_exist: bool) -> None:
    """Raise OutputDirError for a place where a directory cannot be made, before any work is done.

    Args:
        may_exist: False refuses whatever is there already, but for an empty directory.
    """
    if path.is_dir():
        if not may_exist and any(path.iterdir()):
            raise OutputDirError(f"output directory {path} exists and is not empty: choose another one")
        _check_writable(path)
        return
    if path.exists():
        raise OutputDirError(f"output {path} exists and is not a directory")
    if not path.parent.is_dir():
        raise OutputDirError(f"cannot make {path}: its parent directory {path.parent} does not exist")
    _check_writable(path.parent)


def _check_writable(directory: Path) -> None:
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OutputDirError(f"cannot write in {directory}: permission denied")


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for "-"."""
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
def as_user_error(kind: type[TrainingError], what: str | None = None) -> Iterator[None]:
    """Turn the ValueError, TypeError or OSError by which our API refuses an argument into `kind`.

    Only calls that check what the user gave stand inside; elsewhere such an error is a bug and keeps its traceback.
    """
    try:
        yield
    except TrainingError:
        raise
    except (ValueError, TypeError, OSError) as error:
        message = " ".join(str(error).split())
        raise kind(f"{what}: {message}" if what and what not in message else message) from error


@contextlib.contextmanager
def _silent_log() -> Iterator[None]:
    logger = logging.getLogger("minipeft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _loss_text(result: Any) -> str:
    return f"loss {result.loss:.4f} (perplexity {result.perplexity:.4g})"

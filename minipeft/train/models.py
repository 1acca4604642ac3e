"""Base models and their tokenizers: loading them, the positions they have for a text, the mode they are in."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from minipeft.compat import checkpoint_activations, keep_activations
from minipeft.train.errors import ConfigError, MissingExtraError, ModelLoadError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def load_base_model(
    path: str | Path,
    *,
    quantize: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    double_quant: bool = True,
) -> Any:
    """Load a causal language model, in evaluation mode.

    Args:
        path: a model directory, a .gguf file (its weights are dequantized first), or a hub name.
        quantize: "nf4" for 4 bits: weight by weight while loading, but for GGUF after it; None leaves it.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16", "float16", or a torch dtype.
        device: "auto" is the first CUDA device, else the CPU.

    Raises:
        ModelLoadError: no model there, transformers cannot read it, or its files lack weights.
        MissingExtraError: a .gguf file without the packages gguf and accelerate.
    """
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize must be 'nf4' or None, got {quantize!r}")
    from transformers import AutoModelForCausalLM

    # Importing minipeft.nf4.hf makes transformers read 4-bit folders with our quantizer.
    import minipeft.nf4.hf  # noqa: F401

    source, options = _source(path)
    options["dtype"] = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if "gguf_file" in options:
        from transformers import GgufConfig

        # Without dequantize=True transformers keeps a model that it cannot save.
        options["quantization_config"] = GgufConfig(gguf_file=options["gguf_file"], dequantize=True)
    elif quantize:
        options["quantization_config"] = _nf4_config(double_quant)
    with _loading("model", path), _without_gap_report():
        if quantize and "gguf_file" not in options:
            options |= _plain_config(source)
        # Without ignore_mismatched_sizes transformers names the tensors in its log only.
        model, info = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_complete(info, path)
    if quantize and "gguf_file" in options:
        from minipeft.nf4 import quantize_model

        # The config says GGUF and dequantized; what is quantized below is an ordinary model.
        model = quantize_model(model, _nf4_config(double_quant))
    return model.to(resolve_device(device)).eval()


def _plain_config(source: str) -> dict[str, Any]:
    """The argument that lets a checkpoint in MXFP4 (gpt-oss) be quantized to NF4; nothing for others."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or stored.get("quant_method") != "mxfp4":
        return {}
    del config.quantization_config
    return {"config": config}


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None) -> Any:
    """Load the tokenizer that belongs to a model.

    Args:
        chat_template: a file with the template to use in the place of the tokenizer's own.

    Raises:
        ModelLoadError: there is none.
        ConfigError: the template's file cannot be read.
    """
    from transformers import AutoTokenizer

    source, options = _source(path)
    with _loading("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        tokenizer("a")  # its files may hold what is noticed here alone
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"setting 'chat_template': cannot read {str(chat_template)!r}: {reason}") from None
    return tokenizer


def vocabulary_of(model: Any) -> int | None:
    """The number of tokens that the model has embeddings of, None if it does not say."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


def load_position_limit(path: str | Path) -> int | None:
    """The longest sequence a model can take, read from its config alone; None where there is no limit."""
    return getattr(load_text_config(path), "max_position_embeddings", None)


def load_text_config(path: str | Path) -> Any:
    """The config of a model, or of the part of it that reads text; raises as `load_config`."""
    return load_config(path).get_text_config()


def load_config(path: str | Path) -> Any:
    """The config of a model: directory, hub name or .gguf file.

    Raises:
        ModelLoadError: there is none.
    """
    from transformers import AutoConfig

    source, options = _source(path)
    with _loading("model", path):
        return AutoConfig.from_pretrained(source, **options)


def loaded_dtype(path: str | Path, dtype: str, config: Any) -> torch.dtype:
    """The dtype that `load_base_model` gives a model: `config` is its config, as `load_config` gives it."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if config.dtype is not None:
        return config.dtype
    file = next(iter(sorted(Path(path).glob("*.safetensors"))), None) if Path(path).is_dir() else None
    if file is not None:
        with _loading("model", path), safe_open(file, framework="pt") as stored:
            dtypes = [stored.get_slice(name).get_dtype() for name in stored.keys()]  # noqa: SIM118
            return next((_STORED[name] for name in dtypes if name in _STORED), torch.float32)
    return torch.float32


def locate_model(path: str | Path) -> str | Path:
    """Tell a model path on this machine from a hub name, without asking the network.

    Returns:
        A Path for a directory or file that exists, else a string that can only be a hub name.

    Raises:
        ModelLoadError: it names a local place where there is no model.
    """
    text = str(path)
    local = Path(text).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelLoadError(f"no model in directory {text}: expected a config.json there")
        # "." would be written into an adapter as the name of its base, and be another folder the next day.
        return local if local.name not in ("", "..") else local.resolve()
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelLoadError(f"no model at {text}: expected a model directory or a .gguf file")
        return local
    # A hub name is `name` or `owner/name`. Anything else is a path, and so is `owner/name` where there is a
    # directory `owner`.
    looks_local = not _HUB_NAME.fullmatch(text) or local.suffix == ".gguf" or isinstance(path, Path)
    if looks_local or ("/" in text and local.parent.is_dir()):
        raise ModelLoadError(f"no model at {text}: expected a directory with config.json, a .gguf file, or a hub name")
    return text


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a setting names; "auto" is the first CUDA device where there is one, else the CPU.

    Raises:
        ValueError: a device of another kind than CPU and CUDA, or one that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {str(device)!r}")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no CUDA device")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} was asked for, but torch sees {torch.cuda.device_count()} CUDA device(s)")
    return resolved


def seed_everything(seed: int) -> None:
    """Seed torch's generators; call it before an adapter is attached, whose start is random."""
    torch.manual_seed(seed)


def _source(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The arguments of `from_pretrained` for a model path: the source, and for a GGUF file its name."""
    location = locate_model(path)
    if isinstance(location, str):
        _check_hub(location)
        return location, {}
    if location.suffix != ".gguf":
        return str(location), {}
    if not all(importlib.util.find_spec(package) for package in ("accelerate", "gguf")):
        message = "reading a .gguf file needs the packages gguf and accelerate: pip install 'minipeft[demo]'"
        raise MissingExtraError(message)
    return str(location.parent), {"gguf_file": location.name}


def _check_hub(name: str) -> None:
    """Raise ModelLoadError at once if the hub cannot be reached; its client would try for most of a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    # Behind a proxy the hub may be reached although its name does not resolve on this machine.
    if cached or constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        message = f"no model directory or file at {name}, and {host} cannot be reached to look for it there"
        raise ModelLoadError(message) from None


def _nf4_config(double_quant: bool) -> Any:
    from minipeft.nf4 import NF4Config

    return NF4Config(double_quant=double_quant)


def _check_complete(info: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a model whose weights transformers made up, because its files lack them or hold other shapes."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(f"cannot load a model from {path}: its files lack {_few(missing)}")
    wrong = [f"{key} is {tuple(found)}, expected {tuple(due)}" for key, found, due in sorted(info["mismatched_keys"])]
    if wrong:
        raise ModelLoadError(f"cannot load a model from {path}: its files do not fit its config.json: {_few(wrong)}")


def _few(items: list[str], most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


@contextlib.contextmanager
def _without_gap_report() -> Iterator[None]:
    """Keep transformers' table of missing tensors out of the log: we refuse such a model, in one sentence."""

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or not ("MISSING" in text or "MISMATCH" in text)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


@contextlib.contextmanager
def _loading(what: str, path: str | Path) -> Iterator[None]:
    """Turn any error of transformers over a directory or file into a ModelLoadError of one sentence."""
    try:
        yield
    except Exception as error:
        raise ModelLoadError(f"cannot load a {what} from {path}: {told_short(error)}") from error


def told_short(error: Exception) -> str:
    """An error of transformers in one line: they run over many, and the cause may stand in any of them."""
    detail = " ".join(str(error).split()) or type(error).__name__
    kind = re.search(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'> .*AutoModelForCausalLM", detail)
    if kind is None:
        return detail
    # transformers goes on to list all of its families.
    return (
        f"transformers has no causal language model for a {kind[1]}: expected a decoder such as Llama, Qwen2 or GPT-2 "
        "(an encoder, or an encoder and decoder such as T5, is adapted with get_peft_model in Python)"
    )


DEFAULT_MAX_LENGTH = 1024


def resolve_max_length(
    max_length: int | None, model_limit: int | None, virtual: int = 0, setting: str = "max_length"
) -> int:
    """The longest sequence that may be trained on.

    Args:
        model_limit: positions that the model has; None for no limit.
        virtual: how many of these positions virtual tokens take, see `text_positions`.
        setting: what the user calls `max_length`, for the error.

    Raises:
        ConfigError: `max_length` is greater than the positions the model has for a text.
    """
    limit = None if model_limit is None else model_limit - virtual
    if limit is not None and limit < 1:
        room = f"the model's max_position_embeddings ({model_limit})"
        raise ConfigError(f"{virtual} virtual tokens leave no room for a text in {room}: give fewer")
    if max_length is None:
        return DEFAULT_MAX_LENGTH if limit is None else min(DEFAULT_MAX_LENGTH, limit)
    if limit is not None and max_length > limit:
        less = f" less {virtual} virtual tokens" if virtual else ""
        message = f"{setting} ({max_length}) exceeds the model's max_position_embeddings ({model_limit}){less}"
        raise ConfigError(f"{message}: set {setting} to {limit} or less")
    return max_length


def model_position_limit(model: Any) -> int | None:
    """`max_position_embeddings` of the model's (text) config, or None where it has no such limit."""
    config = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


def text_positions(model: str, adapter_config: Any = None) -> tuple[int | None, int]:
    """The positions that a model has (None for no limit), and how many of them an adapter's virtual tokens take.

    Args:
        model: directory, hub name or .gguf file; its config alone is read.

    Raises:
        ModelLoadError: there is none.
    """
    config = load_text_config(model)
    taken = 0 if adapter_config is None else adapter_config.positions_taken(config.model_type)
    return getattr(config, "max_position_embeddings", None), taken


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """`model.eval()` inside, the mode it was in afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def training_mode(model: Any, gradient_checkpointing: bool = False) -> Iterator[None]:
    """`model.train()` inside, the mode it was in afterwards.

    Args:
        gradient_checkpointing: recompute activations in backward, the non-reentrant way: the other one would need
            inputs that require gradients.
    """
    was_training = model.training
    model.train()
    if gradient_checkpointing:
        checkpoint_activations(model)
    try:
        yield
    finally:
        if gradient_checkpointing:
            keep_activations(model)
        model.train(was_training)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Load and save inside without transformers' progress bars: the one bar to watch is the training's."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()

"""The arguments of the commands: kinds of them for argparse, and checks of the places and devices that they name.

A check comes before any work is done: a path that cannot be used is refused before a model is loaded.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from minipeft.train.config import SEED_END
from minipeft.train.errors import ConfigError, OutputDirError, as_user_error
from minipeft.train.methods import AdapterError

# Types of the matrices in a GGUF file.
GGUF_CHOICES = ("auto", "f32", "f16", "bf16", "q8_0")
# Those whose rules on adapters `servers.py` knows.
SERVERS = ("vllm", "llama.cpp")


def positive(text: str) -> int:
    """A whole number above 0; argparse.ArgumentTypeError for anything else."""
    return whole_number(text, least=1)


def count(text: str) -> int:
    """A whole number of 0 or more; argparse.ArgumentTypeError for anything else."""
    return whole_number(text, least=0)


def seed(text: str) -> int:
    """A whole number that torch and numpy take as a seed; argparse.ArgumentTypeError for anything else."""
    if len(text) > 19 or whole_number(text, least=0) >= SEED_END:
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or greater and below 2**63, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """The number of a port, 0 for any that is free; argparse.ArgumentTypeError for anything else."""
    if len(text) > 5 or whole_number(text, least=0) > 65535:
        raise argparse.ArgumentTypeError(f"must be a port, 0 to 65535, got {text!r}")
    return int(text)


def whole_number(text: str, least: int) -> int:
    """A whole number of `least` or more; argparse.ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or greater, got {text!r}")
    return int(text)


def check_device(device: str) -> None:
    """Raise ConfigError for a device that this machine does not have."""
    from minipeft.train import resolve_device

    with as_user_error(ConfigError):
        resolve_device(device)


def check_adapter_path(path: Path) -> None:
    """Raise AdapterError for a directory without an adapter, before the base model is loaded."""
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

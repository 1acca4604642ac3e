"""Every setting of a training run as a flag of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from minipeft.train.config import TrainConfig


def add_config_arguments(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    """Add a `--flag` for every setting, each defaulting to None ("not given").

    Booleans become `--packing / --no-packing`; mappings are written in YAML: `--method-args '{r: 8}'`.
    Values arrive as strings and are converted by `TrainConfig`, so that its errors name the setting.
    """
    hints = typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        if f.name in skip:
            continue
        flag, choices = "--" + f.name.replace("_", "-"), f.metadata.get("choices")
        text = f.metadata["help"] + (f" ({'|'.join(choices)})" if choices else "") + _default_text(f)
        if hints[f.name] is bool:
            parser.add_argument(flag, dest=f.name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, dest=f.name, default=None, help=text.replace("%", "%%"))


def _default_text(f: dataclasses.Field[Any]) -> str:
    """What a flag's help says about its default: nothing where there is none, or where the help says it itself."""
    if f.default is dataclasses.MISSING or f.default is None or "default" in f.metadata["help"]:
        return ""
    words = {True: "yes", False: "no"}
    return f" (default: {words[f.default] if isinstance(f.default, bool) else f.default})"


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """The settings among parsed arguments, for `TrainConfig.from_sources(overrides=...)`."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None}

"""`minipeft export`: a model's folder, or an adapter's, as a file of another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from minipeft.files import size
from minipeft.stored import read_object
from minipeft.train.errors import ConfigError, OutputDirError, as_user_error


def export(args: argparse.Namespace) -> None:
    """`minipeft export`: write a GGUF file.

    Raises:
        ExportError: what cannot be written so.
        ConfigError, OutputDirError: a folder that holds neither model nor adapter, a file that cannot be made.
    """
    folder, output = Path(args.path), Path(args.output)
    if output.exists():
        raise OutputDirError(f"{output} exists: choose another name, or remove it")
    if not output.parent.is_dir():
        raise OutputDirError(f"cannot make {output}: its parent directory {output.parent} does not exist")
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        inner = folder / "adapter"
        hint = f"; there is one in {inner}" if (inner / "adapter_config.json").is_file() else ""
        raise ConfigError(
            f"{folder} holds neither config.json nor adapter_config.json: it is no model or adapter{hint}"
        )
    if args.base is not None and not adapter:
        raise ConfigError("--base goes with an adapter, and the folder is a model")

    from minipeft.export.gguf_files import export_adapter, export_model

    if adapter:
        export_adapter(folder, output, _base_of(folder, args.base), args.type)
        use = f"llama-server -m BASE.gguf --lora {output}"
    else:
        for notice in export_model(folder, output, args.type):
            print(notice)
        use = f"llama-server -m {output}"
    print(f"written: {output} ({size(output.stat().st_size)})")
    print(f"use it: {use}")


def _base_of(folder: Path, given: str | None) -> Path:
    with as_user_error(ConfigError):
        named = given or read_object(folder / "adapter_config.json", ConfigError).get("base_model_name_or_path")
    if not isinstance(named, str) or not (Path(named) / "config.json").is_file():
        raise ConfigError(f"{folder} names {named!r} as its base model, no folder with config.json: give --base DIR")
    return Path(named)

"""One adapter's directory, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minipeft.config import CONFIG_NAME, PeftConfig
from minipeft.errors import AdapterNotFoundError
from minipeft.files import atomic_path, write_text
from minipeft.hub import adapter_folder
from minipeft.renaming import mapped
from minipeft.shards import whole
from minipeft.stored import brief

WEIGHTS_NAME = "adapter_model.safetensors"
# Not PEFT's: tensors that training goes on from, where the first file holds only tensors computed from them.
TRAINING_NAME = "adapter_training.safetensors"
PICKLE_NAME = "adapter_model.bin"


def save_adapter(
    directory: str | Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one adapter directory; every file appears whole or not at all, the configuration last.

    Args:
        directory: Made if it does not exist.
        config: Written with `inference_mode` true, as PEFT does.
        tensors: On-disk names to tensors, kept in their dtype.
        training: Tensors for a second file, which PEFT does not read; without any, an old one is removed.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"cannot save an adapter to {str(directory)!r}: it is a file, expected a directory")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TRAINING_NAME).unlink(missing_ok=True)
    for file, named in ((WEIGHTS_NAME, tensors), (TRAINING_NAME, training)):
        if named:
            flat = _without_shared_memory(named)
            with atomic_path(directory / file) as temporary:
                save_file(flat, temporary, metadata={"format": "pt", **config.file_marks()})
    values = {**config.to_dict(), "inference_mode": True}
    write_text(directory / CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True))


def _without_shared_memory(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; of those that share memory (tied embeddings) the later are copies, for safetensors."""
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        tensor = whole(tensor.detach()).to("cpu").contiguous()
        memory = tensor.untyped_storage().data_ptr()
        flat[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return flat


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory, on the CPU.

    Raises FileNotFoundError when there are none (for a pickled `adapter_model.bin` with the command that converts
    it: a pickle can run code, so it is never opened here), ValueError when the file is damaged.
    """
    file = Path(directory) / WEIGHTS_NAME
    if not file.is_file():
        pickled = file.with_name(PICKLE_NAME)
        if pickled.is_file():
            raise AdapterNotFoundError(
                f"{pickled} is a pickle, which minipeft does not open; if you trust it, convert it with: python -c "
                f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{pickled}', weights_only=True), "
                f"'{file}', metadata={{'format': 'pt'}})\""
            )
        raise AdapterNotFoundError(f"no adapter weights at {str(directory)!r}: expected a file {WEIGHTS_NAME}")
    return _read(file)


def read_marks(directory: str | Path) -> dict[str, str]:
    """The metadata of the file of tensors in an adapter directory (`PeftConfig.file_marks`).

    Raises ValueError when the file is damaged.
    """
    file = Path(directory) / WEIGHTS_NAME
    try:
        with safe_open(file, framework="pt") as tensors:
            return dict(tensors.metadata() or {})
    except SafetensorError as error:
        raise _damaged(file, error) from error


def find_adapter(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The folder of an adapter, its files fetched if `model_id` is a name on the hub.

    Args:
        hub: `hub.HUB_ARGUMENTS`.

    Raises AdapterNotFoundError, a FileNotFoundError, when there is none.
    """
    return adapter_folder(model_id, [CONFIG_NAME, WEIGHTS_NAME], [TRAINING_NAME], subfolder, **hub)


def load_peft_weights(
    model_id: str | Path,
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's folder or name on the hub, for `set_peft_model_state_dict` (PEFT's function).

    Args:
        device: Where they go; the CPU by default.
        key_mapping: Regular expression -> replacement, for names without "base_model.model.".
        hub: `hub.HUB_ARGUMENTS`.

    Raises as `find_adapter` and `read_tensors`.
    """
    stored = read_tensors(adapter_folder(model_id, [WEIGHTS_NAME], (), subfolder, **hub))
    stored = mapped(stored, key_mapping or {}, PeftConfig.key_prefix)
    return {name: tensor.to(device or "cpu") for name, tensor in stored.items()}


def read_training_tensors(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of the second file of an adapter directory; none if there is no such file."""
    file = Path(directory) / TRAINING_NAME
    return _read(file) if file.is_file() else {}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged or not a safetensors file: {brief(str(error))}")

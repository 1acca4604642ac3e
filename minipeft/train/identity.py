"""What makes two runs the same run.

A resumed run must continue the very run that was interrupted. Its identity is everything that decides its
numbers: data, base model, adapter and settings. Paths are not part of it: data and model are known by
content, so a directory may be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from minipeft.train.config import TrainConfig
from minipeft.train.encoding import EncodedDataset
from minipeft.train.errors import CheckpointError

# Settings that decide the numbers. Logging, saving and evaluating do not; neither does gradient
# checkpointing.
_SETTINGS = (
    "packing",
    "batch_size",
    "gradient_accumulation",
    "epochs",
    "max_steps",
    "optimizer",
    "lr",
    "scheduler",
    "scheduler_args",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "max_grad_norm",
    "precision",
    "seed",
)
# Adapter settings that say where something lies or how it was last used, not what it is.
_INCIDENTAL = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")


def run_identity(model: Any, data: EncodedDataset, config: TrainConfig) -> dict[str, Any]:
    """The identity of a run as a flat JSON-serializable mapping."""
    identity: dict[str, Any] = {f"setting {name!r}": getattr(config, name) for name in _SETTINGS}
    if config.packing:
        identity["setting 'max_length'"] = data.max_length
    identity["training data (sha256)"] = data.content_hash()
    identity["base model (fingerprint)"] = model_fingerprint(model)
    for name, peft_config in getattr(model, "peft_config", {}).items():
        settings = peft_config.to_dict()
        for key in sorted(settings.keys() - set(_INCIDENTAL)):
            identity[f"adapter {name!r} {key!r}"] = settings[key]
    # Through JSON, so that it equals what is read back: tuples are lists there, sets are sorted.
    return json.loads(json.dumps(identity, default=_plain))


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError that names every field in which two identities differ."""
    missing = "absent"
    different = [key for key in {**saved, **now} if saved.get(key, missing) != now.get(key, missing)]
    if not different:
        return
    details = "; ".join(
        f"{key} was {_short(saved.get(key, missing))}, is now {_short(now.get(key, missing))}" for key in different
    )
    raise CheckpointError(f"cannot resume from {source}, it belongs to a different run: {details}")


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """sha256 over names, shapes, dtypes and up to 1024 evenly spaced elements of everything frozen.

    That is parameters that need no gradient, and buffers, in which 4-bit weights keep their scales.

    Samples are enough to tell models apart, and cost milliseconds where hashing every byte would cost
    seconds.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.requires_grad:
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        digest.update(tensor_bytes(flat[:: max(1, flat.numel() // 1024)]))
    return digest.hexdigest()


def parameters_digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names and all bytes of the given tensors."""
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(tensor_bytes(parameter.detach()))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor as bytes, in row-major order, whatever its dtype."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _plain(value: Any) -> Any:
    """What JSON has no type for: sets sorted, the rest by its text."""
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

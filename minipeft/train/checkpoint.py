"""Checkpoints: directories from which a run goes on bit for bit.

    checkpoint-<step>/
      adapter_config.json, adapter_model.safetensors   the adapter, as `model.save_pretrained` writes it
      training_state.safetensors                       optimizer state, random generator states
      optimizer_state.safetensors                      optimizer state, if the optimizer keeps it in pages
      training_state.json                              position in the data, schedule, scalars, identity
      manifest.json                                    sizes and checksums of all these, see manifest.py

Nothing is pickled. A checkpoint is written under a temporary name, synced, and renamed, so one that has its
name was whole; what a killed process left is ignored and removed by the next run. What was damaged later is
noticed by the manifest before anything is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minipeft import set_peft_model_state_dict
from minipeft.directory import TRAINING_NAME
from minipeft.files import atomic_directory, atomic_path, remove_directory, write_text
from minipeft.optim import PagedAdamW
from minipeft.shards import laid_out, whole
from minipeft.stored import brief, check_fields, is_finite, read_object, shown
from minipeft.train.errors import CheckpointError
from minipeft.train.manifest import MANIFEST, damage, write_manifest
from minipeft.train.schedule import trainable_parameters

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Progress:
    """The position of a run in its data, and its counters. `batch` counts the micro-batches of `epoch` that are done.

    `window_*` is what has been summed up since the last log row; `tokens` counts real tokens, `seconds` the
    time spent training before this process.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_loss_tokens: int = 0


RandomState = dict[str, torch.Tensor]


def capture_random() -> RandomState:
    """State of torch's generators (uint8 tensors), the only ones that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random(state: RandomState) -> None:
    """Put torch's generators back into a captured state."""
    torch.set_rng_state(state["cpu"])
    devices = [key for key in state if key.startswith("cuda.")]
    for key in devices[: torch.cuda.device_count() if torch.cuda.is_available() else 0]:
        torch.cuda.set_rng_state(state[key], int(key.removeprefix("cuda.")))


def save_checkpoint(
    output_dir: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    progress: Progress,
    random_state: RandomState,
    identity: Mapping[str, Any],
    writes: bool = True,
) -> Path:
    """Write `checkpoint-<step>` atomically and return its path.

    Of a sharded model every process must call, since each has a part; the files are a single process's.

    Args:
        writes: False gives the parts of a process that leaves the writing to another one.
    """
    target = checkpoint_path(output_dir, progress.step)
    tensors, scalars = _split_state(optimizer, trainable_parameters(model))
    trained = {name: whole(parameter.detach()) for name, parameter in trainable_parameters(model).items()}
    with atomic_directory(target) if writes else contextlib.nullcontext(target) as folder:
        model.save_pretrained(str(folder), is_main_process=writes)
        if isinstance(optimizer, PagedAdamW):
            optimizer.save_state(folder / "optimizer_state.safetensors", is_main_process=writes)
        if not writes:
            return target
        tensors |= {f"random/{key}": tensor for key, tensor in random_state.items()}
        state = {
            "format": FORMAT,
            "progress": asdict(progress),
            "identity": dict(identity),
            "trainable_sha256": parameters_digest(trained),
            "optimizer_scalars": scalars,
            "optimizer_groups": [_group_settings(group) for group in optimizer.param_groups],
            "schedule": schedule.state_dict(),
        }
        # safetensors writes files that only their owner may read; atomic_path gives them the usual permissions.
        with atomic_path(folder / "training_state.safetensors") as path:
            save_file(tensors, str(path))
        text = json.dumps(state, indent=2, sort_keys=True, allow_nan=False)
        write_text(folder / "training_state.json", text + "\n")
        write_manifest(folder)
    return target


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """The place of the checkpoint after `step` steps."""
    return output_dir / f"checkpoint-{step}"


def check_whole(path: Path) -> None:
    """Raise CheckpointError, which names the files, unless the checkpoint at `path` is as it was written."""
    if not (path / "training_state.json").is_file() and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a training checkpoint: it has no training_state.json")
    problems = damage(path)
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: not a checkpoint, or of a format this version does not know.
    """
    file = path / "training_state.json"
    try:
        state = read_object(file, lambda message: CheckpointError(f"{file} is damaged: {message}"))
    except OSError:
        raise CheckpointError(f"{path} is not a training checkpoint: it has no training_state.json") from None
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {shown(state.get('format'))}, this version reads format {FORMAT}"
        )
    try:
        if missing := [name for name in _State.__annotations__ if state.get(name) is None]:
            raise ValueError(f"{file}: it lacks {', '.join(missing)}")
        check_fields(state, _State, str(file))
        check_fields(state["progress"], Progress, f"{file}: progress")
        if not all(isinstance(settings, dict) for settings in state["optimizer_groups"]):
            raise ValueError(f"{file}: optimizer_groups must be a list of mappings")
        if not all(isinstance(scalars, dict) for scalars in state["optimizer_scalars"].values()):
            raise ValueError(f"{file}: optimizer_scalars must be a mapping of mappings")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from None
    return state


@dataclass
class _State:
    """The kinds of what lies in training_state.json, all of which must be there."""

    progress: dict
    identity: dict
    trainable_sha256: str
    optimizer_scalars: dict
    optimizer_groups: list
    schedule: dict


def load_checkpoint(
    path: Path, model: Any, optimizer: torch.optim.Optimizer, schedule: Any
) -> tuple[Progress, RandomState]:
    """Put a checkpoint into model, optimizer and schedule; the caller has compared the identity.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter did not come back as it was.
    """
    state = read_checkpoint(path)
    tensors = _read_tensors(path / "training_state.safetensors")
    _load_adapter(path, model)
    parameters = trainable_parameters(model)
    if parameters_digest({name: whole(p.detach()) for name, p in parameters.items()}) != state["trainable_sha256"]:
        message = f"the adapter in {path} does not give the trained parameters back bit for bit"
        raise CheckpointError(f"{message}: its files were changed, or the model is another one")
    try:
        if isinstance(optimizer, PagedAdamW):
            optimizer.load_state(path / "optimizer_state.safetensors")
        else:
            _join_state(optimizer, parameters, tensors, state["optimizer_scalars"], state["optimizer_groups"])
        _check_same_kinds("schedule", schedule.state_dict(), state["schedule"])
        schedule.load_state_dict(state["schedule"])
        random = {k.removeprefix("random/"): v for k, v in tensors.items() if k.startswith("random/")}
        _check_random(random)
        return Progress(**state["progress"]), random
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {brief(repr(error))}") from None


def _check_random(state: RandomState) -> None:
    for key, now in capture_random().items():
        stored = state.get(key)
        if key == "cpu" and stored is None:
            raise ValueError("the state of the random generator is missing")
        if stored is not None and (stored.dtype != now.dtype or stored.shape != now.shape):
            raise ValueError(f"the state of the random generator {key} is {stored.dtype} {tuple(stored.shape)}")
        if stored is not None and key == "cpu":
            torch.Generator().set_state(stored)  # RuntimeError for numbers that no generator can be in


def _check_same_kinds(what: str, ours: Any, stored: Any) -> None:
    """Raise ValueError unless what was stored has the keys and the kinds of value that are here, all the way down."""
    if isinstance(ours, Mapping):
        if not isinstance(stored, Mapping) or stored.keys() != ours.keys():
            raise ValueError(f"{what} must have {', '.join(map(str, ours))}, got {shown(stored)}")
        for key, value in ours.items():
            _check_same_kinds(f"{what}: {key}", value, stored[key])
    elif isinstance(ours, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(ours):
            raise ValueError(f"{what} must be {len(ours)} values, got {shown(stored)}")
        for mine, theirs in zip(ours, stored, strict=True):
            _check_same_kinds(what, mine, theirs)
    elif isinstance(ours, bool) or isinstance(stored, bool) or ours is None:
        if type(ours) is not type(stored):
            raise ValueError(f"{what} must be of the kind of {ours!r}, got {shown(stored)}")
    elif isinstance(ours, int | float):
        if not is_finite(stored):
            raise ValueError(f"{what} must be a finite number, got {shown(stored)}")
    elif not isinstance(stored, type(ours)):
        raise ValueError(f"{what} must be of the kind of {shown(ours)}, got {shown(stored)}")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in a directory, oldest step first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step in a checkpoint's name; CheckpointError for a name of another form."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named checkpoint-<step>")
    return int(match[1])


def prune_checkpoints(output_dir: Path, keep_last: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints."""
    if keep_last is not None:
        for path in list_checkpoints(output_dir)[:-keep_last]:
            remove_directory(path)


def _split_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Optimizer state by parameter name: tensors as `optimizer/<state>/<name>`, everything else as scalars."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    # Paged state may be larger than memory: PagedAdamW writes it itself, page by page.
    if isinstance(optimizer, PagedAdamW):
        return tensors, scalars
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{key}/{name}"] = whole(value.detach()).contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def _join_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
    groups: list[dict[str, Any]],
) -> None:
    """The inverse of `_split_state`, through the optimizer's own `load_state_dict`."""
    ours = [_group_settings(group) for group in optimizer.param_groups]
    _check_same_kinds("optimizer_groups", ours, groups)
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars.items()}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, state_key, name = key.split("/", 2)
            # "step" is a number of its own, whatever the parameter.
            shaped = name in parameters and tensor.shape == parameters[name].shape
            states.setdefault(name, {})[state_key] = laid_out(tensor, parameters[name]) if shaped else tensor
    names = {id(parameter): name for name, parameter in parameters.items()}
    # A state_dict numbers parameters in the order of the groups.
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    numbered = {number: states[name] for number, name in enumerate(ordered) if name in states}
    merged = [
        {
            **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()},
            "params": group["params"],
        }
        for settings, group in zip(groups, optimizer.state_dict()["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": numbered, "param_groups": merged})


def _group_settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _load_adapter(path: Path, model: Any) -> None:
    """Give the model's adapters their stored values; any but "default" lies in a folder of its name."""
    for name in model.peft_config:
        folder = path if name == "default" else path / name
        tensors = _read_tensors(folder / "adapter_model.safetensors")
        if (folder / TRAINING_NAME).is_file():
            tensors |= _read_tensors(folder / TRAINING_NAME)
        try:
            set_peft_model_state_dict(model, tensors, adapter_name=name)
        except ValueError as error:
            raise CheckpointError(f"the adapter in {folder} does not fit the model: {error}") from None


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing") from None
    except Exception as error:
        # safetensors raises its own SafetensorError, a plain subclass of Exception.
        raise CheckpointError(f"checkpoint file {path} is damaged: {error}") from None


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

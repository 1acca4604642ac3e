"""A description of a directory of ours (or of PEFT or transformers), from file headers: no weight is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minipeft.files import size
from minipeft.stored import read_object
from minipeft.train.errors import TrainingError

_PACKED = ".quant_state.bitsandbytes__nf4"


class InspectError(TrainingError, ValueError):
    """A path that is no adapter, checkpoint, run or model, or a damaged file in it."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its shape, and its dtype by its safetensors name, such as BF16."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all elements; a dtype's name tells the bits of one, and a BOOL takes 8."""
        bits = re.search(r"\d+", self.dtype)
        return self.numel * (int(bits[0]) if bits else 8) // 8


def describe(path: str | Path) -> str:
    """A text on an adapter, a checkpoint, a run or a model directory.

    Raises:
        InspectError: no such path, none of these, or a file that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise InspectError(f"{path} does not exist")
    if not path.is_dir():
        raise InspectError(f"{path} is a file: expected the directory of an adapter, a checkpoint, a run or a model")
    for marker, about in _KINDS:
        if (path / marker).is_file():
            return "\n".join(about(path))
    markers = ", ".join(marker for marker, _ in _KINDS)
    raise InspectError(f"{path} is no adapter, checkpoint, run or model: it holds none of {markers}")


def holds_model(path: str | Path) -> bool:
    """False for a directory that `describe` takes for an adapter, a checkpoint or a run; True for anything else."""
    found = next((marker for marker, _ in _KINDS if (Path(path) / marker).is_file()), None)
    return found in (None, "config.json")


def tensors_in(path: Path) -> dict[str, TensorInfo]:
    """The tensors of an adapter's, a checkpoint's or a run's directory, by their names there, from file headers."""
    files = [file for folder in (path, path / "adapter") for file in sorted(folder.glob("*.safetensors"))]
    return {name: info for file in files for name, info in read_header(file).items()}


def verify(path: str | Path) -> Iterator[str]:
    """Lines on each checkpoint of a run, or on the one that `path` is: if its files are as they were written.

    Raises:
        InspectError: after the last line, a checkpoint that is not whole; at once, a path with nothing to verify.
    """
    from minipeft.train.checkpoint import list_checkpoints
    from minipeft.train.manifest import MANIFEST, damage

    path = Path(path)
    found = [path] if any((path / name).is_file() for name in (MANIFEST, "training_state.json")) else []
    found = found or (list_checkpoints(path) if path.is_dir() else [])
    if not found:
        raise InspectError(f"{path} holds no checkpoint, which alone have checksums: expected a run or a checkpoint")
    damaged = []
    for checkpoint in found:
        problems = damage(checkpoint)
        damaged += [checkpoint.name] * bool(problems)
        yield f"{checkpoint}: {'as it was written' if not problems else 'damaged'}"
        yield from (f"  {problem}" for problem in problems)
    if damaged:
        raise InspectError(f"{len(damaged)} of {len(found)} checkpoints are damaged: {', '.join(damaged)}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of the tensors in a safetensors file; none of them is loaded.

    Raises:
        InspectError: the file cannot be read, is cut off, or is no safetensors file.
    """
    try:
        # Python's error for a missing or unreadable file is plainer than safetensors'.
        file.open("rb").close()
        with safe_open(file, framework="numpy") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
            return {name: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except OSError as error:
        raise InspectError(f"cannot read {file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InspectError(f"{file} is cut off, or is not a safetensors file: {error}") from None


def _about_adapter(path: Path) -> Iterator[str]:
    config = _read_json(path / "adapter_config.json")
    tensors = read_header(path / "adapter_model.safetensors")
    values = sum(tensor.numel for tensor in tensors.values())
    yield f"{path}: {_short(config.get('peft_type', '?'))} adapter"
    base = config.get("base_model_name_or_path")
    yield f"  base model        {_short(base or 'not recorded')}"
    yield f"  parameters        {values:,} in {len(tensors)} tensors, {size(sum(t.nbytes for t in tensors.values()))}"
    total = _base_parameters(base)
    if total is not None:
        yield f"  trainable share   {100 * values / (total + values):.3f} % of {total + values:,} parameters"
    else:
        yield "  trainable share   unknown: the base model is not a directory on this machine"
    yield "  config"
    for key, value in sorted(config.items()):
        if value not in (None, False, [], {}) and key not in ("base_model_name_or_path", "peft_type"):
            yield f"    {key:<28}{_short(value)}"
    yield from _tensor_lines(tensors)


def _about_checkpoint(path: Path) -> Iterator[str]:
    state = _read_json(path / "training_state.json")
    progress = state.get("progress")
    done = progress if isinstance(progress, dict) else {}
    yield f"{path}: checkpoint of a training run"
    yield f"  steps done        {_short(done.get('step', '?'))}"
    yield f"  tokens trained on {_short(done.get('tokens', '?'))}"
    saved = read_header(path / "training_state.safetensors")
    paged = path / "optimizer_state.safetensors"
    if paged.exists():
        saved |= read_header(paged)
    yield f"  optimizer state   {size(sum(tensor.nbytes for tensor in saved.values()))}"
    yield ""
    yield from _about_adapter(path)


def _about_model(path: Path) -> Iterator[str]:
    config = _read_json(path / "config.json")
    tensors = _model_tensors(path)
    classes = config.get("architectures")
    names = " ".join(map(str, classes)) if classes and isinstance(classes, list) else "?"
    yield f"{path}: {names} model ({_short(config.get('model_type', '?'))})"
    yield f"  parameters        {model_parameters(tensors, path):,}, {size(sum(t.nbytes for t in tensors.values()))}"
    quantization = config.get("quantization_config")
    if quantization and isinstance(quantization, dict):
        kind = quantization.get("bnb_4bit_quant_type") or quantization.get("quant_method")
        yield f"  quantized         {kind}"
    yield f"  tokenizer         {'yes' if (path / 'tokenizer_config.json').is_file() else 'none'}"
    yield "  config"
    for key, value in sorted(config.items()):
        if not isinstance(value, dict) and value is not None:
            yield f"    {key:<28}{_short(value)}"
    yield from _tensor_lines(tensors)


def _about_run(path: Path) -> Iterator[str]:
    config = _read_json(path / "run.json").get("config")
    if not isinstance(config, dict):
        raise InspectError(f"{path / 'run.json'} holds no config of a run")
    yield f"{path}: training run"
    for key in ("model", "data", "method", "quantize", "lr", "batch_size", "gradient_accumulation", "seed"):
        if config.get(key) is not None:
            yield f"  {key:<28}{_short(config[key])}"
    rows = _log_rows(path / "log.jsonl")
    for name in ("loss", "eval_loss"):
        steps = [row for row in rows if isinstance(row.get(name), int | float)]
        if steps:
            first, last = steps[0], steps[-1]
            yield f"  {name:<28}{first[name]:.4f} (step {first['step']}) -> {last[name]:.4f} (step {last['step']})"
    checkpoints = sorted(p.name for p in path.glob("checkpoint-*"))
    yield f"  checkpoints             {', '.join(checkpoints) or 'none'}"
    if (path / "adapter" / "adapter_config.json").is_file():
        yield ""
        yield from _about_adapter(path / "adapter")
    else:
        yield "  adapter                 none yet: the run is not finished"


# A directory is described by the first of these files that it holds.
_KINDS = (
    ("training_state.json", _about_checkpoint),
    ("adapter_config.json", _about_adapter),
    ("run.json", _about_run),
    ("config.json", _about_model),
)


def _tensor_lines(tensors: dict[str, TensorInfo]) -> Iterator[str]:
    """One line for tensors that differ only in their layer number: `*` stands for it."""
    groups: dict[tuple[str, tuple[int, ...], str], list[TensorInfo]] = {}
    for name, info in tensors.items():
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault((pattern, info.shape, info.dtype), []).append(info)
    yield "  tensors (* is the layer number)"
    for (pattern, shape, dtype), members in sorted(groups.items()):
        nbytes = size(sum(info.nbytes for info in members))
        yield f"    {len(members):>4} x {pattern}  {list(shape)} {dtype}, {nbytes}"


def model_parameters(tensors: dict[str, TensorInfo], path: Path) -> int:
    """Parameters of a model; a packed 4-bit weight counts the values packed in it, its scales nothing."""
    packed = {name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)}
    total = 0
    for name, info in tensors.items():
        owner = next((w for w in (name, name.rsplit(".", 1)[0], name.removesuffix(_PACKED)) if w in packed), None)
        if owner is None:
            total += info.numel
        elif name == owner:
            # A byte holds two values; files store the bytes under several dtypes.
            total += 2 * info.nbytes
    return total


def _base_parameters(base: Any) -> int | None:
    try:
        if not isinstance(base, str) or not (Path(base) / "config.json").is_file():
            return None
        return model_parameters(_model_tensors(Path(base)), Path(base))
    except (InspectError, OSError, ValueError):  # ValueError: a path with a null character
        return None


def _model_tensors(path: Path) -> dict[str, TensorInfo]:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InspectError(f"{path} holds a config.json and no *.safetensors file")
    return {name: info for file in files for name, info in read_header(file).items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, InspectError)
    except OSError as error:
        raise InspectError(f"cannot read {file}: {error.strerror or error}") from None


def _log_rows(file: Path) -> list[dict[str, Any]]:
    from minipeft.train.report import read_log

    return read_log(file) if file.is_file() else []


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

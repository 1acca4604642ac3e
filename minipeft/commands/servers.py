"""The servers vLLM and llama.cpp: how they would read an adapter's folder, by its config and the headers of its file.

The rules are those of vLLM's `lora/peft_helper.py`, `lora/lora_model.py` and `lora/utils.py`, and of llama.cpp's
`convert_lora_to_gguf.py` and `llama-adapter.cpp`. Both read LoRA under PEFT's names, with one alpha for all layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minipeft.commands.inspect import InspectError, TensorInfo, read_header
from minipeft.train.errors import as_user_error

# vLLM's --max-lora-rank is one of these.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FACTOR = re.compile(r"(.+)\.(?:lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)$")
# Embeddings that PEFT stores beside the adapter; both servers pass over them.
_PASSED_OVER = re.compile(r"\.base_layer\.weight$")
_PREFIX = "base_model.model."


def served_by(path: str | Path, server: str) -> str:
    """Lines on how `server`, one of `arguments.SERVERS`, reads the adapter in `path`, or in the run that `path` is.

    Raises:
        InspectError: no adapter there, or one that the server refuses or would read as another function.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        folder = folder / "adapter"
    if not (folder / "adapter_config.json").is_file():
        raise InspectError(f"{path} holds no adapter_config.json: --for is about adapters; a merged model is any other")
    from minipeft import PeftConfig

    with as_user_error(InspectError, str(folder)):
        config = PeftConfig.from_pretrained(folder)
    tensors = read_header(folder / "adapter_model.safetensors")
    problems = list(_problems(config, tensors, server))
    if problems:
        advice = "merge it (minipeft merge) and serve the merged model"
        raise InspectError(f"{server} does not read {folder} as it is: {'; '.join(problems)}. Instead, {advice}")
    return "\n".join(_how(folder, config, tensors, server))


def _problems(config: Any, tensors: Mapping[str, TensorInfo], server: str) -> Iterator[str]:
    if config.type_name != "LORA":
        yield f"it is a {config.type_name} adapter, and only LoRA is read"
        return
    if config.use_dora:
        yield "use_dora is not read"
    if config.modules_to_save:
        yield f"modules_to_save ({', '.join(config.modules_to_save)}) is not read"
    if config.bias != "none":
        yield f"bias must be 'none', it is {config.bias!r}"
    if config.layer_replication:
        yield "layer_replication is not read: the model has fewer layers than the adapter"
    if config.alora_invocation_tokens and server == "vllm":
        yield "alora_invocation_tokens is not read: the adapter would act on the whole prompt"
    if config.target_parameters and server == "llama.cpp":
        yield f"target_parameters ({', '.join(config.target_parameters)}) is not read"
    known = {"lora_magnitude_vector"} if config.use_dora else set()
    known |= set(config.modules_to_save or ())
    for name, info in tensors.items():
        if _PASSED_OVER.search(name) or known.intersection(name.split(".")):
            continue
        if not _FACTOR.match(name):
            yield f"it has tensors that are no lora_A or lora_B, such as {name}"
            break
        if len(info.shape) != 2:
            yield f"only matrices are read, and {name} has the shape {list(info.shape)}"
            break
    ranks = _ranks(tensors)
    if server == "vllm" and ranks and max(ranks.values()) > _VLLM_RANKS[-1]:
        yield f"ranks go to {_VLLM_RANKS[-1]}, it has {max(ranks.values())}"
    wrong = [(path, *_scalings(config, path, rank, server)) for path, rank in ranks.items()]
    wrong = [row for row in wrong if not math.isclose(row[1], row[2], rel_tol=1e-6)]
    if wrong:
        path, right, read = wrong[0]
        fields = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if getattr(config, name)]
        yield (
            f"{len(wrong)} of {len(ranks)} layers would be scaled otherwise ({', '.join(fields)}), such as {path} by "
            f"{read:.4g} in the place of {right:.4g}"
        )


def _ranks(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The rank of each adapted layer, by its name in the model: A has so many rows."""
    ranks = {}
    for name, info in tensors.items():
        found = _FACTOR.match(name)
        if found and name.endswith(("lora_A.weight", "lora_embedding_A")):
            ranks[found[1].removeprefix(_PREFIX)] = info.shape[0]
    return ranks


def _scalings(config: Any, path: str, rank: int, server: str) -> tuple[float, float]:
    """The factor s of a layer's update s B A: the adapter's own, and the one that the server takes."""
    right = config.settings_for(path)[2]
    if server == "vllm":
        return right, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return right, config.lora_alpha / rank


def _how(folder: Path, config: Any, tensors: Mapping[str, TensorInfo], server: str) -> Iterator[str]:
    ranks = _ranks(tensors)
    yield f"{server} reads {folder}: LoRA on {len(ranks)} layers"
    base = config.base_model_name_or_path or "BASE"
    if server == "vllm":
        rank = next(size for size in _VLLM_RANKS if size >= max(ranks.values(), default=1))
        yield f"  vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}"
        targets = sorted({path.rsplit(".", 1)[-1] for path in ranks})
        yield f"  if vLLM's class of the model takes LoRA on {', '.join(targets)}"
    else:
        yield f"  python convert_lora_to_gguf.py --base {base} {folder}"
    if any(name.endswith("lora_embedding_A") for name in tensors):
        yield "  its embeddings must have as many rows as the base model's"

"""`minipeft inspect --for`: how vLLM or llama.cpp would read an adapter's folder, by its config and file header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minipeft.commands.inspect import InspectError, read_header
from minipeft.export.servers import VLLM_RANKS, adapter_ranks, misread, refusals
from minipeft.train.errors import as_user_error


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
    shapes = {name: info.shape for name, info in read_header(folder / "adapter_model.safetensors").items()}
    problems = [*refusals(config, shapes, server), *misread(config, shapes, server)]
    if problems:
        advice = "merge it (minipeft merge) and serve the merged model"
        raise InspectError(f"{server} does not read {folder} as it is: {'; '.join(problems)}. Instead, {advice}")
    return "\n".join(_how(folder, config, shapes, server))


def _how(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]], server: str) -> Iterator[str]:
    ranks = adapter_ranks(shapes)
    yield f"{server} reads {folder}: LoRA on {len(ranks)} layers"
    if server == "vllm":
        base = config.base_model_name_or_path or "BASE"
        rank = next(size for size in VLLM_RANKS if size >= max(ranks.values(), default=1))
        yield f"  vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}"
        targets = sorted({path.rsplit(".", 1)[-1] for path in ranks})
        yield f"  if vLLM's class of the model takes LoRA on {', '.join(targets)}"
    else:
        yield f"  minipeft export {folder} --output adapter.gguf, and llama-server -m BASE.gguf --lora adapter.gguf"
    if any(name.endswith("lora_embedding_A") for name in shapes):
        yield "  its embeddings must have as many rows as the base model's"

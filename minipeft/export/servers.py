"""The rules by which vLLM and llama.cpp take a LoRA adapter.

They are those of vLLM's `lora/peft_helper.py`, `lora/lora_model.py` and `lora/utils.py`, and of llama.cpp's
`convert_lora_to_gguf.py` and `llama-adapter.cpp`. Both read LoRA under PEFT's names, with one alpha for all layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# vLLM's --max-lora-rank is one of these.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FACTOR = re.compile(r"(.+)\.(?:lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)$")
# Embeddings that PEFT stores beside the adapter; both servers pass over them.
_PASSED_OVER = re.compile(r"\.base_layer\.weight$")
_PREFIX = "base_model.model."


def refusals(config: Any, shapes: Mapping[str, tuple[int, ...]], server: str) -> Iterator[str]:
    """Sentences on what of an adapter `server`, "vllm" or "llama.cpp", refuses.

    Args:
        config: the adapter's.
        shapes: of the tensors in its file, by their names there.
    """
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
    for name, shape in shapes.items():
        if _PASSED_OVER.search(name) or known.intersection(name.split(".")):
            continue
        if not _FACTOR.match(name):
            yield f"it has tensors that are no lora_A or lora_B, such as {name}"
            break
        if len(shape) != 2:
            yield f"only matrices are read, and {name} has the shape {list(shape)}"
            break
    ranks = adapter_ranks(shapes)
    if server == "vllm" and ranks and max(ranks.values()) > VLLM_RANKS[-1]:
        yield f"ranks go to {VLLM_RANKS[-1]}, it has {max(ranks.values())}"


def misread(config: Any, shapes: Mapping[str, tuple[int, ...]], server: str) -> Iterator[str]:
    """A sentence on layers that `server` would scale otherwise than the adapter does, if there are any."""
    ranks = adapter_ranks(shapes)
    wrong = [(path, *_scalings(config, path, rank, server)) for path, rank in ranks.items()]
    wrong = [row for row in wrong if not math.isclose(row[1], row[2], rel_tol=1e-6)]
    if wrong:
        path, right, read = wrong[0]
        fields = [name for name in ("use_rslora", "rank_pattern", "alpha_pattern") if getattr(config, name)]
        yield (
            f"{len(wrong)} of {len(ranks)} layers would be scaled otherwise ({', '.join(fields)}), such as {path} by "
            f"{read:.4g} in the place of {right:.4g}"
        )


def adapter_ranks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The rank of each adapted layer, by its name in the model: A has so many rows."""
    ranks = {}
    for name, shape in shapes.items():
        found = _FACTOR.match(name)
        if found and name.endswith(("lora_A.weight", "lora_embedding_A")):
            ranks[found[1].removeprefix(_PREFIX)] = shape[0]
    return ranks


def _scalings(config: Any, path: str, rank: int, server: str) -> tuple[float, float]:
    """The factor s of a layer's update s B A: the adapter's own, and the one that the server takes."""
    right = config.settings_for(path)[2]
    if server == "vllm":
        return right, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return right, config.lora_alpha / rank

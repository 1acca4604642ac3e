"""Base embeddings that are stored beside an adapter, as PEFT does: of adapted ones, and of a resized vocabulary."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.adapter import AdapterModule, base_modules
from minipeft.attach import adapter_modules, base_name
from minipeft.dispatched import original_value


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers calls the model's embeddings; a model for images may have others or none."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embedding = getattr(model, get)() if hasattr(model, get) else None
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Module):
            found.append(embedding)
    return found


# The names under which FSDP, torch.compile and checkpointing hold the module that they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def on_disk(path: str) -> str:
    """The start of the names on disk of what lies in the module called `path`: without the names of wrappers."""
    return _WRAPPERS.sub("", f"{path}.") if path else ""


def embedding_keys(model: nn.Module, adapter: str, prefix: str) -> dict[str, Tensor]:
    """The base embeddings of `model`, under the names that PEFT stores them by when it stores them beside `adapter`.

    PEFT writes them beside an adapter of an embedding, or of a model whose vocabulary was resized.
    """
    found: dict[str, Tensor] = {}
    paths = {module: path for path, module in base_modules(model)}
    for embedding in _embeddings(model):
        path = paths.get(embedding)
        # While an update is merged, the base weight is among the originals.
        weight = getattr(embedding, "_originals", {}).get("weight", embedding._parameters.get("weight"))
        if path is None or weight is None:
            continue
        weight = original_value(embedding, "weight", weight)
        start = f"{prefix}{on_disk(path)}"
        own = embedding.stored_as(adapter) if isinstance(embedding, AdapterModule) else "weight"
        for name in ("weight", "base_layer.weight", own):
            found[f"{start}{name}"] = weight
    return found


def embeddings_to_save(model: nn.Module, adapter: str, wanted: str | bool, prefix: str) -> dict[str, Tensor]:
    """The base embeddings that the file of `adapter` is to hold, by their names there.

    Args:
        wanted: True for all; "auto" for those that the adapter adapts, and for all once the vocabulary was resized.

    Raises ValueError for another `wanted`.
    """
    if wanted not in ("auto", True, False):
        raise ValueError(f"save_embedding_layers must be 'auto', True or False, got {wanted!r}")
    embeddings = embedding_keys(model, adapter, prefix)
    if wanted is True and not embeddings:
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model. By "
            f"save_embedding_layers=True none is saved: {type(model).__name__} has no get_input_embeddings()",
            stacklevel=2,
        )
    # A model without embeddings may have no vocabulary either.
    changed = bool(embeddings) and wanted == "auto" and _vocabulary_changed(model)
    kept = {}
    adapted = False
    for path, module in base_modules(model):
        name, beside = "weight", False
        if isinstance(module, AdapterModule):
            # PEFT's wrapper renames the weight of a module that it adapts.
            name, beside = module.stored_as(adapter), module.stored_beside(adapter)
        key = f"{prefix}{on_disk(path)}{name}"
        if key in embeddings and (wanted is True or changed or (wanted == "auto" and beside)):
            kept[key] = embeddings[key]
            adapted |= beside
    if wanted == "auto" and (changed or adapted):
        reason = "the embedding layer has been resized" if changed else "embedding layers found in `target_modules`"
        warnings.warn(
            f"Setting `save_embedding_layers` to `True` as {reason}. The file holds {sorted(kept)} besides the "
            "adapter; save_embedding_layers=False leaves them out",
            stacklevel=2,
        )
    return kept


def _vocabulary_changed(model: nn.Module) -> bool:
    """True if the base model's folder or the hub's cache says another vocabulary size than the model has now.

    If a model of the hub is not in the cache, or its folder is gone, a warning says that its size is not known.
    """
    name = base_name(model)
    config: Any = getattr(model, "config", None)
    # "org/name", or "gpt2" and its like.
    on_hub = name is not None and not Path(name).exists() and re.fullmatch(r"([\w.-]+/)?[\w.-]+", name) is not None
    if name is None or not hasattr(type(config), "from_pretrained"):
        return False
    # Of the commit that was loaded: the vocabulary may be another in a later one.
    where = {"local_files_only": True, "revision": getattr(config, "_commit_hash", None) or "main"} if on_hub else {}
    try:
        original: Any = type(config).from_pretrained(name, **where)
    except (OSError, ValueError):
        place = "the hub's cache" if on_hub else "a folder of that name"
        warnings.warn(
            f"Could not find a config file in {name} - will assume that the vocabulary was not modified. There is none "
            f"in {place}; if it was resized since, save with save_embedding_layers=True",
            stacklevel=2,
        )
        return False
    sizes = [getattr(one.get_text_config(), "vocab_size", None) for one in (original, config)]
    return sizes[0] != sizes[1]


def check_resizable(model: Any) -> None:
    """Raise ValueError without an embedding, and if an adapter trains one: it would not fit another vocabulary."""
    ends = [_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")]
    if not isinstance(getattr(ends[0], "weight", None), Tensor):
        raise ValueError(f"{type(model).__name__} has no embeddings of tokens that could be resized")
    for path, module in adapter_modules(model):
        if any(module is end for end in ends) and module.adapter_names():
            raise ValueError(
                f"adapters {sorted(module.adapter_names())} train {path}, which cannot be resized under them: "
                "resize the base model first, then attach adapters"
            )


def _end(model: Any, getter: str) -> Any:
    """The model's embedding or its head; None for a model that has none, which transformers answers by an error."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None


def untie_different_embeddings(model: Any) -> None:
    """If merging or a trained copy gave one of two tied embeddings its own weight, say so in the model's config.

    Otherwise saving would drop one of the weights and loading would tie them again.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    first, second = _end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")
    if first is None or second is None:
        return
    if first.weight is not second.weight:
        warnings.warn(
            "Input and output embeddings are no longer tied after merging: each has a weight of its own now. Setting "
            "`tie_word_embeddings=False` in the model's config, so that both are saved and loaded",
            stacklevel=2,
        )
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}

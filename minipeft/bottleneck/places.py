"""The usual places of bottleneck adapters in each family of models, for configs that name no modules."""

from __future__ import annotations

import dataclasses

from torch import nn

from minipeft.bottleneck.config import BottleneckConfig


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of a family's layers: endings of module names (regular expressions where they hold a backslash).

    Attributes:
        whole: True if the attention and the feed-forward part are modules of their own; only then is the part's input
            there to be read by a parallel adapter.
        layers: The list that numbers the layers, where a later number stands in the names too.
    """

    attention: str
    feed_forward: str
    cross: str | None = None
    whole: bool = True
    layers: str | None = None


_LLAMA = _Parts("self_attn", "mlp")
_BERT = _Parts(r"layer\.\d+\.attention\.output\.dense", r"layer\.\d+\.output\.dense", whole=False)

# By transformers' `config.model_type`.
PLACES = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"), _LLAMA),
    **dict.fromkeys(("gemma3_text", "phi3", "smollm3", "olmo2", "granite"), _LLAMA),
    "gpt2": _Parts("attn", "mlp"),
    "opt": _Parts("self_attn", "fc2", whole=False),
    "gpt_neox": _Parts("attention", "mlp"),
    "bert": _BERT,
    "roberta": _BERT,
    # With images; its vision tower, of another width, has modules of the same names.
    "gemma3": _Parts(r"language_model\.layers\.\d+\.self_attn", r"language_model\.layers\.\d+\.mlp"),
    "t5": _Parts("SelfAttention", "DenseReluDense", "EncDecAttention", layers="block"),
}


def usual_targets(model: nn.Module, config: BottleneckConfig) -> list[str] | str:
    """The targets that mh_adapter, output_adapter and cross_adapter stand for in the model's family.

    Raises ValueError for a family that is not known, or has no such place.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    places = PLACES.get(family or "")
    if places is None:
        raise ValueError(
            f"there are no usual places for adapters in a model of type {family!r}: name the modules to put them "
            "after in target_modules, such as ['self_attn', 'mlp']"
        )
    if config.is_parallel and not places.whole:
        raise ValueError(
            f"is_parallel=True: the feed-forward part of a {family!r} model is not one module, so its input cannot be "
            "read there; use is_parallel=False, or name modules that read what the adapter should in target_modules"
        )
    if config.cross_adapter and places.cross is None:
        raise ValueError(f"cross_adapter=True: no cross-attention is known in a model of type {family!r}")
    if config.layers_to_transform is not None:
        config.layers_pattern = config.layers_pattern or places.layers
    wanted = (
        (config.mh_adapter, places.attention),
        (config.cross_adapter, places.cross),
        (config.output_adapter, places.feed_forward),
    )
    chosen = [place for asked, place in wanted if asked and place is not None]
    return list(chosen) if not any("\\" in place for place in chosen) else rf".*\.(?:{'|'.join(chosen)})"

"""The usual places of bottleneck adapters in each family of models, for configs that name no modules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from minipeft.adapter import base_modules
from minipeft.bottleneck.config import BottleneckConfig
from minipeft.targets import plain_module_names


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The parts of a family's layers: endings of module names (regular expressions where they hold a backslash).

    Attributes:
        attention, feed_forward, cross: The modules that give a part's output, before it is added to the part's input.
        sums: In the order attention, feed-forward part, cross-attention, the module that returns that sum
            (`original_ln_before`), such as a whole layer, which returns the last of its sums. None where there is none.
        norm: The layer norm at the end of the modules in `sums`, in families whose norms stand after the sums.
        reads: Where a part is no module of its own: ending of the module that gives its output -> ending of one that
            reads its input.
        layers: The list that numbers the layers, where a later number stands in the names too.
    """

    attention: str
    feed_forward: str
    cross: str | None = None
    sums: tuple[str | None, str | None, str | None] = (None, None, None)
    norm: str | None = None
    reads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layers: str | None = None


def _llama(attention: str = "self_attn", mlp: str = "mlp", layer: str = r"layers\.\d+") -> _Parts:
    """A family whose norms stand before its parts, which are modules."""
    return _Parts(attention, mlp, sums=(None, layer, None))


def _bert_reads(query: str) -> dict[str, str]:
    return {
        "output.dense": "intermediate.dense",
        **{f"{part}.output.dense": f"{part}.self.{query}" for part in ("attention", "crossattention")},
    }


_BERT = _Parts(
    r"layer\.\d+\.attention\.output\.dense",
    r"layer\.\d+\.output\.dense",
    cross=r"layer\.\d+\.crossattention\.output\.dense",
    sums=(r"layer\.\d+\.attention\.output", r"layer\.\d+\.output", r"layer\.\d+\.crossattention\.output"),
    norm="LayerNorm",
    reads=_bert_reads("query"),
)
_MBART = _Parts("self_attn", "fc2", cross="encoder_attn", sums=(None, r"layers\.\d+", None), reads={"fc2": "fc1"})
_BART = dataclasses.replace(_MBART, norm="final_layer_norm")
_T5 = _Parts(
    "SelfAttention",
    "DenseReluDense",
    cross="EncDecAttention",
    # Each part is a module that returns its sum.
    sums=(
        r"block\.\d+\.layer\.0",
        r"(?:encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)",
        r"decoder\.block\.\d+\.layer\.1",
    ),
    layers="block",
)
_GPT = _llama("attn", "mlp", r"h\.\d+")

# By transformers' `config.model_type`.
PLACES = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _llama()),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3", "smollm3", "granite"), _llama()),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _llama()),
    "llama4_text": _llama(mlp="feed_forward"),
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "olmoe", "stablelm", "starcoder2", "cohere", "cohere2"), _llama()),
    **dict.fromkeys(("gpt2", "gptj", "gpt_bigcode", "gpt_neo"), _GPT),
    "gpt_neox": _llama("attention", "mlp"),
    "falcon": _llama("self_attention", "mlp", r"h\.\d+"),
    # Its modules add their inputs themselves.
    "bloom": _Parts(
        "self_attention.dense",
        "mlp.dense_4h_to_h",
        sums=(None, r"h\.\d+", None),
        reads={
            "mlp.dense_4h_to_h": "mlp.dense_h_to_4h",
            "self_attention.dense": "self_attention.query_key_value",
        },
    ),
    "opt": _Parts("self_attn", "fc2", sums=(None, r"layers\.\d+", None), reads={"fc2": "fc1"}),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "deberta": dataclasses.replace(_BERT, reads=_bert_reads("in_proj")),
    "deberta-v2": dataclasses.replace(_BERT, reads=_bert_reads("query_proj")),
    "distilbert": _Parts("attention", "ffn", sums=(None, r"layer\.\d+", None), norm="output_layer_norm"),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "bart": _BART,
    **dict.fromkeys(("mbart", "pegasus", "whisper"), _MBART),
    **dict.fromkeys(("vit", "deit"), _llama("attention", "mlp")),
    **dict.fromkeys(("clip", "clip_text_model", "clip_vision_model", "siglip_text_model"), _llama()),
    # What gathers an image's tokens behind the layers has an `mlp`, too.
    **dict.fromkeys(("siglip", "siglip_vision_model"), _llama(r"layers\.\d+\.self_attn", r"layers\.\d+\.mlp")),
}


def usual_targets(model: nn.Module, config: BottleneckConfig) -> list[str] | str:
    """The targets that mh_adapter, output_adapter and cross_adapter stand for in the model's family.

    Fills in `config.parallel_reads`, `config.sum_norm` and the `layers_pattern` of the family.

    Raises ValueError for a family that is not known, or has no such place.
    """
    known: Any = getattr(model, "config", None)
    family, inside = getattr(known, "model_type", None), ""
    if family not in PLACES:
        known, inside = _language_model(model)
    places = PLACES.get(getattr(known, "model_type", ""))
    if places is None:
        raise ValueError(
            f"there are no usual places for adapters in a model of type {family!r}: name the modules to put them "
            f"after in target_modules; the parts of its layers are {_parts_of_layers(model)}"
        )
    if known.model_type == "opt" and not known.do_layer_norm_before:
        places = dataclasses.replace(places, norm="final_layer_norm")
    if config.cross_adapter and places.cross is None:
        raise ValueError(f"cross_adapter=True: no cross-attention is known in a model of type {family!r}")
    if config.layers_to_transform is not None:
        config.layers_pattern = config.layers_pattern or places.layers
    if config.is_parallel and places.reads:
        config.parallel_reads = dict(places.reads)
    if config.original_ln_before:
        config.sum_norm = places.norm
    chosen: list[str] = []
    outputs = (places.attention, places.feed_forward, places.cross)
    asked = ("mh_adapter", "output_adapter", "cross_adapter")
    # In this order, which files list them in.
    for number in (0, 2, 1):
        if not getattr(config, asked[number]):
            continue
        place = places.sums[number] if config.original_ln_before else outputs[number]
        if place is None:
            raise ValueError(
                f"{asked[number]}=True with original_ln_before=True: no module of a {family!r} model gives the sum of "
                "this part and its input; leave original_ln_before at False, as houlsby() does"
            )
        chosen.append(place)
    if not inside and not any("\\" in place for place in chosen):
        return chosen
    return rf"{inside}(?:.*\.)?(?:{'|'.join(chosen)})"


def _language_model(model: Any) -> tuple[Any, str]:
    """The config of the language model inside `model`, if any, and an expression for the start of its modules' names.

    The towers for images have modules of the same names and other widths.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    decoder = model.get_decoder() if text is not config and hasattr(model, "get_decoder") else None
    path = next((path for path, module in base_modules(model) if module is decoder), "")
    return (text, rf"{re.escape(path)}\.") if path else (None, "")


def _parts_of_layers(model: nn.Module) -> list[str]:
    """The names of the modules that stand directly in numbered layers."""
    found: dict[str, Any] = {}
    for path in plain_module_names(model):
        above, _, name = path.rpartition(".")
        if above.rpartition(".")[2].isdigit() and not name.isdigit():
            found[name] = None
    return list(found) or [name for name, _ in model.named_children()]

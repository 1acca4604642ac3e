"""Causal decoders with virtual tokens: the known families, and the decoder's part around its attention modules.

The decoder holds the adapters' tensors; every attention module below takes its keys and values from there (see
`attention.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule, base_modules
from minipeft.compat import cache_of, causality, rotation_table
from minipeft.virtual.attention import (
    PrefixedAttention,
    PrefixedRotary,
    Rotation,
    ShiftedOffset,
    ShiftedPositions,
    TableRotation,
    argument_names,
    cache_argument,
    depends_on_length,
    layer_number,
)
from minipeft.virtual.masks import check_implementation, check_packing
from minipeft.virtual.tokens import (
    ENCODER_DECODERS,
    ENCODERS,
    Sizes,
    VirtualTokensConfig,
    VirtualTokensHolder,
    check_mask,
)

# transformers' `config.model_type` of the decoders that rotate queries and keys, and of those with a learned table.
# A list and not a guess: a layer that rotates in its own way would give wrong scores and no error.
ROTARY = (
    *("llama", "llama4_text", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3", "smollm3", "granite"),
    *("gpt_neox", "gptj", "gpt_oss", "olmo", "olmo2", "olmo3", "olmoe", "cohere", "cohere2", "starcoder2"),
    *("stablelm", "falcon", "nemotron", "helium", "glm", "glm4", "ernie4_5", "exaone4", "seed_oss"),
    *("hunyuan_v1_dense", "apertus", "arcee"),
)
LEARNED = ("gpt2", "gpt_bigcode", "gpt_neo", "opt")
# A bias of the scores by distance.
ALIBI = ("bloom",)
DECODERS = (*ROTARY, *LEARNED, *ALIBI)


class VirtualTokensDecoder(VirtualTokensHolder):
    """A causal decoder with virtual tokens."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain decoder's forward; ids, mask, positions and cache are about the text alone.

        Raises ValueError for an attention implementation, a packing or a mask that would hide the virtual tokens.
        """
        if getattr(self, "_is_replica", False):
            connect_replica(self)
        encoders = self.acting_encoders()
        if encoders:
            check_implementation(self.config)
            check_packing(self.config, kwargs)
            kwargs = _about_the_text(args, kwargs)
            prompts = [encoder for encoder in encoders if hasattr(encoder, "prepare")]
            self._prepare(prompts, sum(encoder.length for encoder in encoders), args, kwargs)
        return super().forward(*args, **kwargs)

    def _prepare(self, prompts: list[Any], length: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """Send the prompts through the model, one after the other: each sees those before it.

        Args:
            length: The number of virtual tokens that act.
        """
        if not prompts:
            return
        _check_checkpointing(self)
        for prompt in prompts:
            prompt.forget()
        dtype = self.get_input_embeddings().weight.dtype  # type: ignore[operator]
        cache = cache_of(kwargs)
        rotary = getattr(self, "rotary_emb", None)
        if isinstance(rotary, PrefixedRotary):
            # The whole text's length chooses the frequencies, for the prompt as well.
            rotary.expected = length + _text_length(args, kwargs, cache)
        for prompt in prompts:
            prompt.prepare(self.keys_and_values, dtype, cache)
        if isinstance(rotary, PrefixedRotary):
            rotary.expected = None

    def keys_and_values(self, **inputs: Any) -> list[tuple[Tensor, Tensor]]:
        """The keys (as rotated for positions from 0) and values of each layer for one text.

        Args:
            inputs: `input_ids` (1, tokens) or `inputs_embeds` (1, tokens, hidden).

        Returns: per layer two (heads, tokens, head_dim).
        """
        layers = [module for module in self.modules() if isinstance(module, PrefixedAttention)]
        # A layer that is checkpointed would run again in the backward pass, when nothing is recorded any more.
        checkpointed: list[Any] = [m for m in self.modules() if getattr(m, "gradient_checkpointing", False)]
        recorded: list[Any] = [[] for _ in layers]
        for layer in layers:
            layer.recorder = recorded[layer_number(layer)]
        for module in checkpointed:
            module.gradient_checkpointing = False
        if torch.compiler.is_compiling():
            # The compiler cannot break its graph inside a `try`.
            super().forward(**inputs, use_cache=False)
            _end_recording(layers, checkpointed)
        else:
            try:
                super().forward(**inputs, use_cache=False)
            finally:
                _end_recording(layers, checkpointed)
            _unshard_in_backward(self, layers, recorded)
        return [(key[0], value[0]) for both in recorded for key, value in both]


def _unshard_in_backward(model: Any, layers: list[PrefixedAttention], recorded: list[Any]) -> None:
    """Have FSDP2 gather a layer's weights once the gradient of its recorded keys and values comes.

    It gathers them when that of the layer's output does, and of the last layer's nobody asks for one here.
    """
    sharded = [(path, part) for path, part in model.named_modules() if hasattr(part, "set_requires_all_reduce")]
    if not sharded:
        return
    names = {layer: path for path, layer in model.named_modules() if isinstance(layer, PrefixedAttention)}
    for layer in layers:
        path = f"{names[layer]}."
        # The innermost one around it: its name is the longest.
        _, owner = max(
            (one for one in sharded if path.startswith(f"{one[0]}." if one[0] else "")), key=lambda one: len(one[0])
        )
        for tensor in (tensor for both in recorded[layer_number(layer)] for tensor in both if tensor.requires_grad):
            tensor.register_hook(lambda grad, owner=owner: owner.unshard() and None)


def _end_recording(layers: list[PrefixedAttention], checkpointed: list[Any]) -> None:
    for layer in layers:
        layer.recorder = None
    for module in checkpointed:
        module.gradient_checkpointing = True


def _check_checkpointing(decoder: nn.Module) -> None:
    """Refuse reentrant checkpointing of a prompt.

    There each layer's backward is a backward of its own, and would go through the prompt's one graph again.
    """
    for module in decoder.modules() if decoder.training else ():
        recompute = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and recompute is not None:
            if getattr(recompute, "keywords", {}).get("use_reentrant", True):
                raise ValueError(
                    "prompt tuning needs non-reentrant checkpointing: "
                    "model.activation_checkpointing_enable({'use_reentrant': False})"
                )
            return


def _about_the_text(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a decoder, with positions that count from each row's first real token.

    Without positions transformers counts padding too. The text's own rotary scores do not change by that, but its
    distance to the virtual tokens would, and a padded row would not give what it gives alone.

    Raises ValueError for a 2-D mask that is not for the text alone.
    """
    mask, cache = kwargs.get("attention_mask"), cache_of(kwargs)
    ids = args[0] if args else kwargs.get("input_ids")
    text = ids if ids is not None else kwargs.get("inputs_embeds")
    if not torch.is_tensor(mask) or mask.dim() != 2 or text is None:
        return kwargs
    check_mask(mask, text, cache)
    if kwargs.get("position_ids") is not None or len(args) > 2:
        return kwargs
    counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    tokens = text.shape[1] + (0 if cache is None else cache.get_seq_length())
    # A mask for a static cache may be longer than what there is so far.
    last = tokens if mask.shape[1] > tokens else mask.shape[1]
    return {**kwargs, "position_ids": counted[:, last - text.shape[1] : last]}


def decoder_targets(model: Any, config: VirtualTokensConfig) -> list[str]:
    """The names of a model's decoder, of its attention modules, and of its learned position tables.

    Raises ValueError for a model that cannot have virtual tokens.
    """
    decoder = _decoder(model, config)
    # Of the decoder alone: a vision-language model has attention in its vision tower, too.
    path = next(path for path, module in base_modules(model) if module is decoder)
    inside = [(f"{path}.{name}".lstrip("."), module) for name, module in base_modules(decoder) if name]
    attentions = [name for name, module in inside if is_self_attention(module)]
    model_config = model.config.get_text_config()
    layers = sorted(layer_number(model.get_submodule(path)) for path in attentions)
    if layers != list(range(model_config.num_hidden_layers)):
        raise ValueError(
            f"{type(model).__name__} has {model_config.num_hidden_layers} layers, and self-attention in {layers}; "
            "virtual tokens need one in each"
        )
    causal = all(getattr(model.get_submodule(path), "is_causal", True) for path in attentions)
    if config.type_name == "PROMPT_TUNING" and not causal:
        raise ValueError(
            f"PromptTuning does not work on {type(model).__name__}, which attends in both directions: a prompt would "
            "have to see the text; prefix tuning works"
        )
    if config.type_name == "PROMPT_TUNING" and getattr(model_config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"PromptTuning does not work on {type(model).__name__}, which looks every token up again in each layer: a "
            "prompt has no token; prefix tuning works"
        )
    config.fit(Sizes.of_decoder(model_config))
    tables = [name for name, module in inside if _is_position_table(module, name)]
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is not None and depends_on_length(rotary):
        tables.append(next(name for name, module in inside if module is rotary))
    elif model_config.model_type not in LEARNED:
        tables = []
    return [path, *attentions, *tables]


def _decoder(model: Any, config: VirtualTokensConfig) -> Any:
    """The module that holds the layers. Raises ValueError for a model that cannot have virtual tokens."""
    kind = type(config).__name__.removesuffix("Config")
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is None:
        raise ValueError(f"{kind} needs a transformers model, got {type(model).__name__}")
    text = model.config.get_text_config()
    if model.config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        raise ValueError(
            f"{kind} does not know encoder-decoders of type {family!r}; it works on {', '.join(ENCODER_DECODERS)} and "
            "on decoders alone"
        )
    if text.model_type not in DECODERS or getattr(text, "alibi", False):
        alibi = " with alibi=True" if text.model_type in DECODERS else ""
        raise ValueError(
            f"{kind} does not know how a model of type {text.model_type!r}{alibi} tells positions; it works on "
            f"{', '.join(sorted(DECODERS + ENCODERS + ENCODER_DECODERS))}"
        )
    decoder = model.get_decoder()
    while decoder.get_output_embeddings() is not None:
        # A language model, head and all, inside one that sees images; Llama 4's gives itself.
        inner = decoder.get_decoder()
        decoder = decoder.model if inner is decoder else inner
    if text.model_type in ROTARY and not any("rotary" in name or "embed_positions" in name for name in _parts(decoder)):
        raise ValueError(f"{kind} finds no rotary embedding in the decoder of {type(model).__name__}")
    return decoder


def _parts(module: nn.Module) -> list[str]:
    """The names of what `module` holds, parts and tensors."""
    return [name for path, part in base_modules(module) for name in (path, *part._buffers)]


def is_self_attention(module: Any) -> bool:
    """True if `module` is a decoder layer's self-attention, as transformers writes them."""
    if layer_number(module) is None or cache_argument(module) is None:
        return False
    # Bloom's does not say that it is causal.
    says_so = causality(module) is not None or "alibi" in argument_names(module)
    return says_so and not getattr(module, "is_cross_attention", False)


def _is_position_table(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Embedding) and path.rpartition(".")[2] in ("wpe", "embed_positions")


def attention_mixin(module: Any) -> type[AdapterModule] | None:
    """The mixin for a self-attention module or a position table; None for another module."""
    if is_self_attention(module):
        return PrefixedAttention
    if isinstance(module, nn.Embedding):
        return ShiftedOffset if hasattr(module, "offset") else ShiftedPositions
    return PrefixedRotary if hasattr(module, "inv_freq") else None


def connect_attention(model: Any, adapter: str, targets: list[str]) -> None:
    """Give the attention modules and tables among `targets` the encoder that `targets[0]` holds."""
    holder = model.get_submodule(targets[0])
    for path in targets[1:]:
        module = model.get_submodule(path)
        module.connect(adapter, holder.prompt_encoder[adapter], _rotation_of(holder, module))


def _rotation_of(holder: Any, module: Any) -> Rotation | TableRotation | None:
    """The way in which an attention module below `holder` turns its keys to other positions, None if none is needed."""
    rotary = getattr(holder, "rotary_emb", None)
    if isinstance(rotary, PrefixedRotary):
        return None  # the text is moved up instead
    table = rotation_table(rotary, module)
    if table is not None:
        return TableRotation(module, table)
    # SmolLM3 and Cohere 2 leave some layers without rotation.
    rotates = getattr(module, "use_rope", True) and not _without_rotation(module)
    return Rotation(rotary, module) if rotary is not None and rotates else None


def _without_rotation(module: Any) -> bool:
    """True for a layer of Cohere 2 or EXAONE 4 that sees the whole text: only those with a window rotate."""
    family = getattr(getattr(module, "config", None), "model_type", None)
    if family == "cohere2":
        return module.sliding_window is None
    return family == "exaone4" and module.sliding_window is not None and not module.is_sliding


def connect_replica(holder: Any) -> None:
    """Let the modules of a replica made by nn.DataParallel take the replica's encoders, not the original's."""
    for module in holder.modules():
        if isinstance(getattr(module, "virtual_tokens", None), dict) and module is not holder:
            rotated = getattr(module, "rotation", None) is not None
            module.virtual_tokens = {name: holder.prompt_encoder[name] for name in module.virtual_tokens}
            if rotated:
                module.rotation = _rotation_of(holder, module)


def _text_length(args: tuple, kwargs: dict[str, Any], cache: Any) -> int:
    """The number of tokens of the text so far: the longest row's, if padding is known."""
    positions = kwargs.get("position_ids")
    if torch.is_tensor(positions):
        return int(positions.max()) + 1
    ids = args[0] if args else kwargs.get("input_ids")
    text = ids if ids is not None else kwargs["inputs_embeds"]
    return text.shape[1] + (0 if cache is None else int(cache.get_seq_length()))

"""Prefixes in models that are no causal decoders: BERT and its like, and the decoders of encoder-decoders.

The prefix is the same, keys and values in front of each layer's own (`key_values.py`); only where it goes differs:

- A model that reads in both directions: in front of every self-attention's keys. Its learned positions move up, as the
  text stands after the prefix; outputs are about the text, so the first position is the text's own.
- An encoder-decoder: in front of the keys of the decoder's self-attention, as in PEFT. The encoder and the attention to
  its output are the base model's. T5's scores have a bias by distance: the prefix stands at positions -P..-1 there,
  too. Padding in the decoder belongs behind the text, since these decoders count it as text.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minipeft.adapter import AdapterModule, Method, base_modules
from minipeft.virtual.attention import (
    PrefixedAttention,
    ShiftedOffset,
    ShiftedPositions,
    argument_names,
)
from minipeft.virtual.decoders import DECODERS, is_self_attention
from minipeft.virtual.masks import check_implementation
from minipeft.virtual.tokens import (
    ENCODER_DECODERS,
    ENCODERS,
    Sizes,
    VirtualTokensConfig,
    VirtualTokensHolder,
    check_mask,
)


class PrefixHolder(VirtualTokensHolder):
    """The part of a model whose self-attention modules see the prefixes that it holds."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.acting_encoders():
            return super().forward(*args, **kwargs)
        check_implementation(self.config)
        kwargs = {**dict(zip(argument_names(self), args, strict=False)), **kwargs}
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        text = ids if ids is not None else kwargs.get("inputs_embeds")
        if mask is not None and mask.dim() == 2 and text is not None:
            check_mask(mask, text, kwargs.get("past_key_values"))
        return super().forward(**kwargs)


def _find(model: Any, config: VirtualTokensConfig, skip: list[str]) -> list[str]:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in ENCODERS:
        if model.config.is_decoder:
            raise ValueError(f"prefixes work on {family} models that read both ways, not on one that is a decoder")
        holder, sizes, causal = model.base_model, Sizes.of_encoder(model.config), False
    elif family in ENCODER_DECODERS and model.config.is_encoder_decoder:
        holder, sizes, causal = model.get_decoder(), Sizes.of_encoder_decoder(model.config), True
    else:
        return DECODERS.find(model, config, skip)
    config.fit(sizes)
    root = next(path for path, module in base_modules(model) if module is holder)
    inside = [(f"{root}.{name}".lstrip("."), module) for name, module in base_modules(holder) if name]
    # Of an encoder-decoder's attention modules those that read its own text are the causal ones.
    attentions = [name for name, module in inside if is_self_attention(module) and module.is_causal == causal]
    assert len(attentions) == sizes.layers, (attentions, sizes)
    return [root, *attentions, *(name for name, module in inside if _is_position_table(module, name))]


def _is_position_table(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Embedding) and path.rpartition(".")[2] in ("position_embeddings", "embed_positions")


def _mixin_for(module: Any) -> type[AdapterModule]:
    family = getattr(getattr(module, "config", None), "model_type", None)
    if is_self_attention(module):
        return PrefixedAttention
    if isinstance(module, nn.Embedding):
        return ShiftedOffset if hasattr(module, "offset") else ShiftedPositions
    return PrefixHolder if family in ENCODERS + ENCODER_DECODERS else DECODERS.mixin_for(module)


def _connect(model: Any, adapter: str, targets: list[str]) -> None:
    holder = model.get_submodule(targets[0])
    if not isinstance(holder, PrefixHolder):
        assert DECODERS.connect is not None
        DECODERS.connect(model, adapter, targets)
        return
    for path in targets[1:]:
        module: Any = model.get_submodule(path)
        # No layer of these models turns its keys by their position.
        module.connect(adapter, holder.prompt_encoder[adapter], None)


PREFIXES = Method(find=_find, mixin_for=_mixin_for, connect=_connect)

"""Virtual tokens in models that are no causal decoders: BERT and its like, and encoder-decoders such as T5.

A prefix is the same there, keys and values in front of each layer's own (`attention.py`); only its place differs:

- A model that reads in both directions: in front of every self-attention's keys. Its learned positions move up, as the
  text stands after the prefix; outputs are about the text, so the first position is the text's own.
- An encoder-decoder: in front of the keys of the decoder's self-attention, as in PEFT. The encoder and the attention to
  its output are the base model's. T5's scores have a bias by distance: the prefix stands at positions -P..-1 there,
  too. Padding in the decoder belongs behind the text, since these decoders count it as text.

A prompt goes into every row, because a text that is read in both directions changes what the model makes of the prompt
(Lester et al. 2021, section 2): in front of the row's first token, behind its padding. The outputs are cut to the text
again; but where one position speaks for the whole row, it is the first, the prompt's, as in PEFT. A decoder that reads
an encoder's output reads that of the prompt, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule, base_modules
from minipeft.compat import cache_of, causality
from minipeft.virtual.attention import argument_names
from minipeft.virtual.decoders import attention_mixin, connect_replica, is_self_attention
from minipeft.virtual.masks import check_implementation
from minipeft.virtual.tokens import (
    ENCODER_DECODERS,
    ENCODERS,
    PROMPTED_ENCODERS,
    Sizes,
    VirtualTokensConfig,
    VirtualTokensHolder,
    check_mask,
)


def family_of(model: Any) -> str | None:
    """transformers' `config.model_type` of a model or of a part that has the config; None without one."""
    return getattr(getattr(model, "config", None), "model_type", None)


class PrefixHolder(VirtualTokensHolder):
    """The part of a model whose self-attention modules see the prefixes that it holds."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain forward; the mask is about the text alone.

        Raises ValueError for a mask of another length.
        """
        if getattr(self, "_is_replica", False):
            connect_replica(self)
        if not self.acting_encoders():
            return super().forward(*args, **kwargs)
        check_implementation(self.config)
        kwargs = {**dict(zip(argument_names(self), args, strict=False)), **kwargs}
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        text = ids if ids is not None else kwargs.get("inputs_embeds")
        if mask is not None and mask.dim() == 2 and text is not None:
            check_mask(mask, text, cache_of(kwargs))
        return super().forward(**kwargs)


class PromptedEncoder(VirtualTokensHolder):
    """An encoder whose rows begin with the prompts of the acting adapters.

    Attributes:
        cuts: True if its output holds the states of the text alone.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("cuts",)

    get_input_embeddings: Any
    cuts: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Of prefixes, which this holder may have too, the layers take care.
        """input_ids (B, T) or inputs_embeds (B, T, hidden) -> the plain forward's results, cut to the text if `cuts`.

        Raises ValueError for positions, or a mask that is not about the text alone.
        """
        encoders = [encoder for encoder in self.acting_encoders() if hasattr(encoder, "prepare")]
        if not encoders:
            return super().forward(*args, **kwargs)
        ids = args[0] if args else kwargs.pop("input_ids", None)
        if len(args) > 1 or kwargs.get("position_ids") is not None:
            raise ValueError("give the mask by name, and no position_ids: the prompts have positions, too")
        embeds = kwargs.pop("inputs_embeds", None)
        embeds = self.get_input_embeddings()(ids) if embeds is None else embeds  # (B, T, hidden)
        prompt = torch.cat([encoder.embedding.weight[: encoder.length] for encoder in encoders]).to(embeds)
        plain_tuple = kwargs.pop("return_dict", None) is False
        order = row_order(kwargs.get("attention_mask"), len(prompt), embeds)
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
            if kwargs.get(name) is not None:
                kwargs[name] = in_order(kwargs[name], len(prompt), order, fill)
        joined = torch.cat([prompt.expand(len(embeds), -1, -1), embeds], dim=1)
        embeds = joined.gather(1, order[..., None].expand_as(joined))
        out = super().forward(inputs_embeds=embeds, return_dict=True, **kwargs)
        out = _cut(out, order, len(prompt)) if self.cuts else out
        return out.to_tuple() if plain_tuple else out


class PromptReader(AdapterModule):
    """The decoder of an encoder-decoder: the mask of what it reads has places for the prompts."""

    name_prefix: ClassVar[str] = ""
    _own_attributes: ClassVar[tuple[str, ...]] = ("virtual_tokens",)

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "virtual_tokens"):
            self.virtual_tokens: dict[str, Any] = {}

    def add_adapter(self, adapter: str, config: Any, path: str, dtype: torch.dtype, init: bool) -> None:
        """Nothing: the tensors are the encoder's (`connect`)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain decoder's forward; `encoder_attention_mask` (batch, text tokens) is widened by the prompts.

        Raises ValueError for an encoder's output that was made with other adapters acting.
        """
        acting = () if self.merged_adapters else self.switch.acting
        length = sum(self.virtual_tokens[adapter].length for adapter in acting if adapter in self.virtual_tokens)
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if length and mask is not None:
            order = row_order(mask, length, mask)
            kwargs["encoder_attention_mask"] = in_order(mask, length, order, 1)
            if states is not None and states.shape[1] != order.shape[1]:
                raise ValueError(
                    f"the encoder's output has {states.shape[1]} positions, the text and the prompt have "
                    f"{order.shape[1]}: it was made with other adapters acting"
                )
        return super().forward(*args, **kwargs)

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self.virtual_tokens.pop(adapter, None)


def row_order(mask: Tensor | None, length: int, like: Tensor) -> Tensor:
    """The source, in [prompt][padding and text], of each position of [padding][prompt][text].

    Args:
        mask: (B, T), 0 for padding, or None.
        length: P.
        like: (B, T, ...), for the shape.

    Returns: (B, P + T) indices.

    Raises ValueError for a mask of another shape.
    """
    batch, tokens = like.shape[:2]
    if mask is None:
        return torch.arange(length + tokens, device=like.device).expand(batch, -1)
    if mask.shape != (batch, tokens):
        raise ValueError(
            f"attention_mask must be about the text alone, {(batch, tokens)}, got {tuple(mask.shape)}; the prompts are "
            "added inside"
        )
    before = (mask.long().cumsum(dim=1) == 0).sum(dim=1, keepdim=True)  # (B, 1): padding in front
    before = torch.where(before == tokens, 0, before)
    at = torch.arange(length + tokens, device=like.device).expand(batch, -1)
    return torch.where(at < before, at + length, torch.where(at < before + length, at - before, at))


def in_order(rows: Tensor, length: int, order: Tensor, fill: int) -> Tensor:
    """(B, T) -> (B, P + T): `rows` with `fill` for the prompts, in `order`."""
    return torch.cat([rows.new_full((len(rows), length), fill), rows], dim=1).gather(1, order)


def _cut(out: Any, order: Tensor, length: int) -> Any:
    """`out` with the states of the text alone, (B, P + T, hidden) -> (B, T, hidden)."""
    places = order.argsort(dim=1)[:, length:, None]  # where each of the text's positions went

    def text(states: Tensor) -> Tensor:
        return states.gather(1, places.expand(-1, -1, states.shape[-1]))

    out.last_hidden_state = text(out.last_hidden_state)
    if out.get("hidden_states") is not None:
        out.hidden_states = tuple(text(states) for states in out.hidden_states)
    return out


def prefix_targets(model: Any, config: VirtualTokensConfig) -> list[str] | None:
    """The names of the holder of a prefix, its attention modules and its position tables; None for another model.

    Raises ValueError for an encoder that was made a decoder.
    """
    family = family_of(model)
    if family in ENCODERS:
        if model.config.is_decoder:
            raise ValueError(f"prefixes work on {family} models that read both ways, not on one that is a decoder")
        holder, sizes, causal = model.base_model, Sizes.of_encoder(model.config), False
    elif family in ENCODER_DECODERS and model.config.is_encoder_decoder:
        holder, sizes, causal = model.get_decoder(), Sizes.of_encoder_decoder(model.config), True
    else:
        return None
    config.fit(sizes)
    root = next(path for path, module in base_modules(model) if module is holder)
    inside = [(f"{root}.{name}".lstrip("."), module) for name, module in base_modules(holder) if name]
    # Of an encoder-decoder's attention modules those that read its own text are the causal ones.
    attentions = [
        name
        for name, module in inside
        if is_self_attention(module) and causality(module) == causal and not name.endswith(".EncDecAttention")
    ]
    assert len(attentions) == sizes.layers, (attentions, sizes)
    return [root, *attentions, *(name for name, module in inside if _is_position_table(module, name))]


def _is_position_table(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Embedding) and path.rpartition(".")[2] in ("position_embeddings", "embed_positions")


def prefix_mixin(module: Any) -> type[AdapterModule] | None:
    """The mixin for a module of `prefix_targets`; None for a module of another model."""
    if family_of(module) not in ENCODERS + ENCODER_DECODERS:
        return None
    return attention_mixin(module) or PrefixHolder


def prompt_targets(model: Any, config: VirtualTokensConfig) -> list[str] | None:
    """The names of the encoder that holds a prompt and of the decoder that reads it; None for another model.

    Raises ValueError for an encoder that was made a decoder.
    """
    family = family_of(model)
    encoders = ENCODERS + PROMPTED_ENCODERS
    if family not in encoders + ENCODER_DECODERS:
        return None
    if getattr(model.config, "is_decoder", False) and family in encoders:
        raise ValueError(f"prompts work on {family} models that read both ways, not on one that is a decoder")
    # PEFT writes down the numbers of an encoder-decoder's encoder.
    config.fit(dataclasses.replace(Sizes.of_encoder(model.config), submodules=2 if family in ENCODER_DECODERS else 1))
    holders = [model.base_model] if family in encoders else [model.get_encoder(), model.get_decoder()]
    paths = {id(module): path for path, module in base_modules(model)}
    return [paths[id(holder)] for holder in holders]


def prompt_mixin(module: Any) -> type[AdapterModule] | None:
    """The mixin for a module of `prompt_targets`; None for a module of another model."""
    family = family_of(module)
    if family in ENCODERS + PROMPTED_ENCODERS:
        return PromptedEncoder
    if family in ENCODER_DECODERS:
        # T5's halves are of one class, BART's are told apart by the arguments of their forward.
        reads = getattr(module, "is_decoder", "encoder_hidden_states" in argument_names(module))
        return PromptReader if reads else PromptedEncoder
    return None


def connect_prompt(model: Any, adapter: str, targets: list[str]) -> None:
    """Tell an encoder whether to cut its outputs to the text, and its readers of the prompt that they read."""
    holder: Any = model.get_submodule(targets[0])
    # RoBERTa's classifier takes the first position itself, BERT's is given it.
    whole = type(model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
    holder.cuts = len(targets) == 1 and not whole
    for path in targets[1:]:
        reader: nn.Module = model.get_submodule(path)
        assert isinstance(reader, PromptReader)
        reader.virtual_tokens[adapter] = holder.prompt_encoder[adapter]

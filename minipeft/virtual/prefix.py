"""Prefix tuning: per layer P learned keys and values in front of the text's (Li and Liang 2021).

    softmax(q [K_p; K]^T) [V_p; V]        (section 4.2, equation 3, with the prefix's activations as parameters)

The prefix is one matrix (P, layers * 2 * heads * head_dim), in the order layer, {key, value}, head, feature, as in
PEFT's files. With `prefix_projection` it is MLP(E) for a smaller E (section 4.3): the MLP is needed for training
alone, so an adapter's file holds the product, and a second file beside it what training goes on from.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.adapter import AdapterModule, Method
from minipeft.dispatched import device_of
from minipeft.virtual.decoders import LEARNED, VirtualTokensDecoder, attention_mixin, connect_attention, decoder_targets
from minipeft.virtual.encoders import prefix_mixin, prefix_targets
from minipeft.virtual.tokens import Sizes, VirtualTokensConfig

logger = logging.getLogger("minipeft")


@dataclasses.dataclass
class PrefixTuningConfig(VirtualTokensConfig):
    """PEFT's `PrefixTuningConfig`: the same names, defaults and JSON.

    Args:
        num_virtual_tokens: P, the length of the prefix.
        encoder_hidden_size: Width of the projection's hidden layer; token_dim by default.
        prefix_projection: Train an MLP that makes the prefix. Ignored with `inference_mode`: then the prefix is
            held as the MLP made it.
        init_weights: None (random) or "zero" (keys and values 0). A prefix does better started from a text: see
            `initialize_kv_prefix_from_text`.

    The other fields are filled in from the model. Raises ValueError for values out of range.
    """

    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prefix_projection, bool):
            raise ValueError(f"prefix_projection must be true or false, got {self.prefix_projection!r}")
        if self.encoder_hidden_size is not None:
            self._check_positive_int("encoder_hidden_size")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None or 'zero', got {self.init_weights!r}")

    @classmethod
    def completed(cls, arguments: Mapping[str, Any], model: str) -> dict[str, Any]:
        # A projection's output cannot be started from a text.
        return {**({"init_weights": "zero"} if arguments.get("prefix_projection") else {}), **arguments}

    def positions_taken(self, model_type: str) -> int:
        """None on a model that rotates keys; P on one with a learned table, whose first positions the prefix takes."""
        return (self.num_virtual_tokens or 0) if model_type in LEARNED else 0

    def for_loading(self, trainable: bool, training_file: bool) -> None:
        super().for_loading(trainable, training_file)
        if trainable and self.prefix_projection and not training_file:
            logger.warning(
                "the prefix was saved without its projection, as PEFT does: it is trained directly from here"
            )
            self.prefix_projection = False

    def fit(self, sizes: Sizes) -> None:
        self._check_positive_int("num_virtual_tokens")
        # Under grouped queries PEFT, too, takes the model's own numbers for those of its keys.
        self._settle("token_dim", sizes.heads * sizes.head_dim, accepted=(sizes.hidden,))
        self._settle("num_attention_heads", sizes.heads, accepted=(sizes.queries,))
        self._settle("num_layers", sizes.layers)
        # The number of submodules is two, as in PEFT's files, or one: see `PrefixEncoder`.
        self.num_transformer_submodules = self.num_transformer_submodules or sizes.submodules
        if self.num_transformer_submodules > sizes.submodules:
            self._settle("num_transformer_submodules", sizes.submodules)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def make_encoder(self, holder: Any, dtype: torch.dtype, init: bool) -> nn.Module:
        device = device_of(holder.get_input_embeddings())
        return PrefixEncoder(self, init).to(device, dtype)


class PrefixEncoder(nn.Module):
    """The tensors of one prefix.

    In an encoder-decoder with `num_transformer_submodules=2`, its default, layer i of L sees the columns of layer
    2 i mod L: that is how PEFT cuts its files' matrix up there, so for an even L half of the columns do nothing. With 1
    every layer has its own; PEFT does not read such a file rightly.

    Attributes:
        embedding: weight (P, layers * 2 * token_dim), or (P, token_dim) with a projection.
        transform: the projection (token_dim -> encoder_hidden_size -> layers * 2 * token_dim), or None.
    """

    ready = True

    def __init__(self, config: PrefixTuningConfig, init: bool = True):
        super().__init__()
        P, dim, layers = config.num_virtual_tokens, config.token_dim, config.num_layers
        assert P and dim and layers and config.num_attention_heads and config.encoder_hidden_size
        self.layers, self.submodules = layers, config.num_transformer_submodules or 1
        self.length, self.shape = P, (config.num_attention_heads, dim // config.num_attention_heads)
        projected = config.prefix_projection and not config.inference_mode
        self.embedding = nn.utils.skip_init(nn.Embedding, P, dim if projected else layers * 2 * dim)
        self.transform: nn.Sequential | None = None
        if projected:
            hidden = config.encoder_hidden_size
            self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * dim))
        if init:
            self._start(config.init_weights)

    @torch.no_grad()
    def _start(self, kind: str | None) -> None:
        nn.init.normal_(self.embedding.weight)
        if kind == "zero":
            last = self.embedding if self.transform is None else self.transform[2]
            for parameter in last.parameters():
                parameter.zero_()

    def key_value(self, layer: int) -> tuple[Tensor, Tensor]:
        """Two (heads, P, head_dim): the keys, not rotated, and values of `layer`."""
        heads, head_dim = self.shape
        span = 2 * heads * head_dim
        first = layer * self.submodules % self.layers
        columns = slice(first * span, (first + 1) * span)
        if self.transform is None:
            flat = self.embedding.weight[:, columns]
        else:
            hidden = self.transform[1](self.transform[0](self.embedding.weight))
            # This layer's part of the last product: together the layers make it once.
            last: Any = self.transform[2]
            flat = F.linear(hidden, last.weight[columns], last.bias[columns])
        both = flat.view(self.length, 2, heads, head_dim).permute(1, 2, 0, 3)  # (P, 2 h d) -> (2, h, P, d)
        return both[0], both[1]

    def state(self) -> dict[str, Tensor]:
        """The live tensors; without a projection they are what PEFT's file holds."""
        if self.transform is None:
            return {"/prompt_embeddings": self.embedding.weight}
        return {f"/{name}": parameter for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def flat(self, values: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        """(P, layers * 2 * token_dim): the prefix, with `values(tensor)` in the place of each live tensor."""
        E = values(self.embedding.weight)
        if self.transform is None:
            return E
        first: Any = self.transform[0]
        last: Any = self.transform[2]
        hidden = torch.tanh(F.linear(E, values(first.weight), values(first.bias)))
        return F.linear(hidden, values(last.weight), values(last.bias))


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any = None,
    *,
    text: str | Tensor,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start a prefix from the keys and values that the base model computes for a text (PEFT's function).

    Then the model with the prefix continues as it would after the text.

    Args:
        tokenizer: Not needed when `text` is token ids.
        text: What to read, at least P tokens long; or ids, (tokens,) or (1, tokens).
        adapter_name: The adapter that acts, by default.
        use_chat_template: Read `text` as a system message, where the tokenizer has a template.
        max_length: Cut the text after so many tokens.

    Returns: (P, layers * 2 * token_dim), what the prefix now is.

    Raises ValueError for an adapter that is no prefix or has a projection, for a text that is too short, and for models
        that are no causal decoders.
    """
    adapter = adapter_name or model.active_adapter
    config = model.peft_config.get(adapter)
    if not isinstance(config, PrefixTuningConfig):
        raise ValueError(f"adapter {adapter!r} is not a prefix ({type(config).__name__})")
    decoder = next((m for m in model.modules() if isinstance(m, VirtualTokensDecoder)), None)
    if decoder is None:
        raise ValueError(
            f"{type(model).__name__} is no causal decoder, so no prefix of it can start from a text; take "
            "init_weights='zero'"
        )
    encoder: Any = decoder.prompt_encoder[adapter]
    if encoder.transform is not None:
        raise ValueError(f"adapter {adapter!r} has a projection, whose start cannot be computed from a text")
    if num_virtual_tokens not in (None, encoder.length):
        raise ValueError(f"num_virtual_tokens={num_virtual_tokens}, but the adapter has {encoder.length}")
    ids = text if torch.is_tensor(text) else _ids_of(tokenizer, text, use_chat_template)
    ids = ids.reshape(1, -1)[:, :max_length].to(encoder.embedding.weight.device)
    if ids.shape[1] < encoder.length:
        raise ValueError(f"the text has {ids.shape[1]} tokens, a prefix of {encoder.length} needs at least as many")
    with model.disable_adapter():
        layers = decoder.keys_and_values(input_ids=ids[:, : encoder.length])
    # (2 L, heads, P, head_dim) -> (P, L 2 heads head_dim)
    stacked = torch.stack([states for both in layers for states in both])
    flat = stacked.permute(2, 0, 1, 3).reshape(encoder.length, -1)
    encoder.embedding.weight.copy_(flat)
    return encoder.embedding.weight.detach().clone()


def start_from_tokens(model: Any, tokens: Iterable[int]) -> str | None:
    """Start the prefix "default" from the keys and values of the first tokens of a text, repeated if it is short.

    Nothing happens, and None is returned, if its config asks for another start; else a notice for the user.
    """
    config = model.peft_config["default"]
    if config.init_weights or config.prefix_projection:
        return None
    ids = list(itertools.islice(itertools.cycle(tokens), config.num_virtual_tokens))
    initialize_kv_prefix_from_text(model, text=torch.tensor(ids))
    return f"the prefix starts from the first {len(ids)} tokens of the data"


def _ids_of(tokenizer: Any, text: str, use_chat_template: bool) -> Tensor:
    if tokenizer is None:
        raise ValueError("a tokenizer is needed to read a text; or give token ids")
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        return tokenizer.apply_chat_template(message, return_dict=False, return_tensors="pt")
    return tokenizer(text, return_tensors="pt")["input_ids"]


def _find(model: Any, config: VirtualTokensConfig, skip: list[str]) -> list[str]:
    return prefix_targets(model, config) or decoder_targets(model, config)


def _mixin_for(module: Any) -> type[AdapterModule]:
    return attention_mixin(module) or prefix_mixin(module) or VirtualTokensDecoder


PREFIXES = Method(find=_find, mixin_for=_mixin_for, connect=connect_attention)

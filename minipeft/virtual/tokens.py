"""The config and the holder that prefix and prompt tuning share, in every kind of model.

An adapter's tensors are one module, its encoder, held by a part of the model as `prompt_encoder.<adapter>` (PEFT's
name). Which part, and how its layers come to see the virtual tokens, depends on the model: see `decoders.py` (causal
decoders) and `encoders.py` (BERT, T5 and their like).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule
from minipeft.attach import adapter_modules
from minipeft.config import PeftConfig
from minipeft.stored import MOST_COUNT

# transformers' `config.model_type` of the models that read in both directions, and of the encoder-decoders, that this
# was tried on.
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
# Those whose attention takes no keys but its own: prompts alone.
PROMPTED_ENCODERS = ("deberta", "deberta-v2", "distilbert")
ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The numbers of a model that virtual tokens must fit.

    Attributes:
        hidden: Numbers in what a layer gives.
        queries, heads: Attention heads, and heads of a key.
        head_dim: Numbers in one head of a key.
        layers: Layers that attend to virtual tokens.
        submodules: 2 for an encoder-decoder, else 1.
        embedding: Numbers in an embedding, if not `hidden`: a layer may follow that widens it.
    """

    hidden: int
    queries: int
    heads: int
    head_dim: int
    layers: int
    submodules: int = 1
    embedding: int | None = None

    @classmethod
    def of_decoder(cls, config: Any) -> Sizes:
        """Of a decoder, by its config."""
        queries = config.num_attention_heads
        layers = [config]
        if (by_layer := getattr(config, "per_layer_config", None)) is not None:
            # The largest: Gemma 4's are of two shapes.
            layers = [by_layer[layer] for layer in range(config.num_hidden_layers)]
        heads = max(getattr(layer, "num_key_value_heads", None) or queries for layer in layers)
        head_dim = max(getattr(layer, "head_dim", None) or config.hidden_size // queries for layer in layers)
        if getattr(config, "new_decoder_architecture", False):
            heads = queries  # Falcon repeats its keys before they are cached.
        elif getattr(config, "multi_query", False):
            heads = 1
        narrow = getattr(config, "word_embed_proj_dim", None)
        return cls(config.hidden_size, queries, heads, head_dim, config.num_hidden_layers, embedding=narrow)

    @classmethod
    def of_encoder(cls, config: Any) -> Sizes:
        """Of a model that reads in both directions."""
        heads = config.num_attention_heads
        narrow = getattr(config, "embedding_size", None)
        layers = config.num_hidden_layers
        return cls(config.hidden_size, heads, heads, config.hidden_size // heads, layers, embedding=narrow)

    @classmethod
    def of_encoder_decoder(cls, config: Any) -> Sizes:
        """Of an encoder-decoder: its decoder's, under T5's names or BART's."""
        heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "d_kv", None) or config.hidden_size // heads
        layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        return cls(config.hidden_size, heads, heads, head_dim, layers, 2)


@dataclasses.dataclass
class VirtualTokensConfig(PeftConfig):
    """The fields that prefix and prompt tuning share: PEFT's `PromptLearningConfig`.

    Args:
        num_virtual_tokens: P, how many virtual tokens stand before the text; a model that gets them asks for it.
        token_dim: Numbers in one virtual token (a key, for a prefix). The model says it; so with the next three.
        num_transformer_submodules: 1; in encoder-decoders 2.
        num_attention_heads: Heads of a key.
        num_layers: Layers.
        modules_to_save: Modules that the adapter trains whole.

    Raises ValueError for values out of range.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    key_prefix: ClassVar[str] = "base_model."
    is_prompt_learning: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
            if getattr(self, field) is not None:
                self._check_positive_int(field)

    def _check_positive_int(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{field} must be a positive integer, got {value!r}")
        if value > MOST_COUNT:
            raise ValueError(f"{field} must be at most {MOST_COUNT:,}, got {value}")

    def fit(self, sizes: Sizes) -> None:
        """Fill in what the model says.

        Raises ValueError when a field that was given says something else.
        """
        raise NotImplementedError

    def make_encoder(self, holder: Any, dtype: torch.dtype, init: bool) -> nn.Module:
        """The adapter's tensors, for the part of a model that holds them."""
        raise NotImplementedError

    def _settle(self, field: str, right: int, accepted: tuple[int, ...] = ()) -> None:
        given = getattr(self, field)
        if given is not None and given != right and given not in accepted:
            raise ValueError(f"{field}={given} does not fit the model, which has {right}; leave {field} out")
        setattr(self, field, right)


class VirtualTokensHolder(AdapterModule):
    """The part of a model that holds adapters' virtual tokens: a decoder's is called `model` or `transformer`."""

    # Nothing is put before the class's name: transformers finds what it knows about a model by it.
    name_prefix: ClassVar[str] = ""
    _own_attributes: ClassVar[tuple[str, ...]] = ("prompt_encoder",)

    prompt_encoder: nn.ModuleDict

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "prompt_encoder"):
            self.prompt_encoder = nn.ModuleDict()

    def add_adapter(self, adapter: str, config: VirtualTokensConfig, path: str, dtype: torch.dtype, init: bool) -> None:
        """Create the encoder of `adapter`, in `dtype`; left uninitialized when `init` is false (for loading)."""
        self.prompt_encoder[adapter] = config.make_encoder(self, dtype, init)

    def acting_encoders(self) -> list[Any]:
        """The encoders of the adapters that act, in their order."""
        acting = () if self.merged_adapters else self.switch.acting
        return [self.prompt_encoder[adapter] for adapter in acting if adapter in self.prompt_encoder]

    def adapter_names(self) -> set[str]:
        return super().adapter_names() | set(self.prompt_encoder)

    def adapter_state(self, adapter: str) -> dict[str, Tensor]:
        own = super().adapter_state(adapter)
        return {**own, **self.prompt_encoder[adapter].state()} if adapter in self.prompt_encoder else own  # type: ignore[operator]

    def stored_state(self, adapter: str, values: Any) -> dict[str, Tensor]:
        own = super().stored_state(adapter, values)
        if adapter not in self.prompt_encoder:
            return own
        left = {name: own[name] for name in own if name not in self.prompt_encoder[adapter].state()}  # type: ignore[operator]
        return {**left, "/prompt_embeddings": self.prompt_encoder[adapter].flat(values)}  # type: ignore[operator]

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        if adapter in self.prompt_encoder:
            del self.prompt_encoder[adapter]


def prompt_encoders(model: nn.Module) -> nn.ModuleDict:
    """The encoders of a model's adapters, by name (PEFT's `model.prompt_encoder`)."""
    holders = (module for _, module in adapter_modules(model) if isinstance(module, VirtualTokensHolder))
    return next(holders).prompt_encoder


def check_mask(mask: Any, text: Tensor, cache: Any) -> None:
    """Raise ValueError for a 2-D mask that is not about the text alone: transformers would misread it in silence.

    Args:
        text: (batch, tokens, ...), this call's.
        cache: What holds the tokens before them, or None.
    """
    tokens = text.shape[1] + (0 if cache is None else cache.get_seq_length())
    # A mask for a static cache may be longer than what there is so far.
    if mask.shape[1] != tokens and not getattr(cache, "is_compileable", False):
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {tokens} tokens; it is about the text alone, the virtual "
            "tokens are added inside"
        )

"""Where the virtual tokens of prefix and prompt tuning live, and which models can have them.

An adapter's tensors are one module, its encoder, held by the decoder as `prompt_encoder.<adapter>` (PEFT's name).
Every attention module below takes its keys and values from there (see `key_values.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.configs import PeftConfig
from minipeft.methods.base import AdapterModule, Method
from minipeft.methods.key_values import (
    PrefixedAttention,
    Rotation,
    ShiftedOffset,
    ShiftedPositions,
    cache_argument,
    check_implementation,
)

# transformers' `config.model_type` of the decoders that rotate queries and keys, and of those with a learned table.
# A list and not a guess: a layer that rotates in its own way would give wrong scores and no error.
ROTARY = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    *("phi3", "smollm3", "olmo2", "granite", "gpt_neox"),
)
LEARNED = ("gpt2", "opt")


@dataclasses.dataclass
class VirtualTokensConfig(PeftConfig):
    """What prefix and prompt tuning share: PEFT's `PromptLearningConfig`.

    Args:
        num_virtual_tokens: P, how many virtual tokens stand before the text.
        token_dim: Numbers in one virtual token (a key, for a prefix). The model says it; so with the next three.
        num_transformer_submodules: 1.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
            value = getattr(self, field)
            if value is None and field != "num_virtual_tokens":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{field} must be a positive integer, got {value!r}")

    def fit(self, config: Any) -> None:
        """Fill in what the model's own `config` says.

        Raises ValueError when a field that was given says something else.
        """
        raise NotImplementedError

    def make_encoder(self, decoder: Any, dtype: torch.dtype, init: bool) -> nn.Module:
        """The adapter's tensors, for `decoder`."""
        raise NotImplementedError

    def _settle(self, field: str, right: int, accepted: tuple[int, ...] = ()) -> None:
        given = getattr(self, field)
        if given is not None and given != right and given not in accepted:
            raise ValueError(f"{field}={given} does not fit the model, which has {right}; leave {field} out")
        setattr(self, field, right)


class VirtualTokensHolder(AdapterModule):
    """The part of a model that holds adapters' virtual tokens: what a language model calls `model` or `transformer`."""

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


class VirtualTokensDecoder(VirtualTokensHolder):
    """A causal decoder with virtual tokens."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        encoders = self.acting_encoders()
        if encoders:
            check_implementation(self.config)
            kwargs = _about_the_text(args, kwargs)
            self._prepare([encoder for encoder in encoders if hasattr(encoder, "prepare")], kwargs)
        return super().forward(*args, **kwargs)

    def _prepare(self, prompts: list[Any], kwargs: dict[str, Any]) -> None:
        """Send the prompts through the model, one after the other: each sees those before it."""
        if not prompts:
            return
        _check_checkpointing(self)
        for prompt in prompts:
            prompt.forget()
        dtype = self.get_input_embeddings().weight.dtype  # type: ignore[operator]
        for prompt in prompts:
            prompt.prepare(self.keys_and_values, dtype, kwargs.get("past_key_values"))

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
            layer.recorder = recorded[layer.layer_idx]
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
        return [(key[0], value[0]) for both in recorded for key, value in both]


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

    Raises ValueError for a 2-D mask that is not for the text alone: transformers would cut or misread it in silence.
    """
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    ids = args[0] if args else kwargs.get("input_ids")
    text = ids if ids is not None else kwargs.get("inputs_embeds")
    if not torch.is_tensor(mask) or mask.dim() != 2 or text is None:
        return kwargs
    tokens = text.shape[1] + (0 if cache is None else cache.get_seq_length())
    if mask.shape[1] != tokens and not getattr(cache, "is_compileable", False):
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {tokens} tokens; it is about the text alone, the virtual "
            "tokens are added inside"
        )
    if kwargs.get("position_ids") is not None or len(args) > 2:
        return kwargs
    counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    # A mask for a static cache may be longer than what there is so far.
    last = tokens if mask.shape[1] > tokens else mask.shape[1]
    return {**kwargs, "position_ids": counted[:, last - text.shape[1] : last]}


def _find(model: Any, config: VirtualTokensConfig, skip: list[str]) -> list[str]:
    decoder = _decoder(model, config)
    # Of the decoder alone: a model that sees has attention elsewhere, too.
    path = next(path for path, module in model.named_modules() if module is decoder)
    inside = [(f"{path}.{name}".lstrip("."), module) for name, module in decoder.named_modules() if name]
    attentions = [name for name, module in inside if is_self_attention(module)]
    model_config = model.config.get_text_config()
    layers = sorted(model.get_submodule(path).layer_idx for path in attentions)
    if layers != list(range(model_config.num_hidden_layers)):
        raise ValueError(
            f"{type(model).__name__} has {model_config.num_hidden_layers} layers, and self-attention in {layers}; "
            "virtual tokens need one in each"
        )
    if not all(model.get_submodule(path).is_causal for path in attentions):
        raise ValueError(f"{type(model).__name__} attends in both directions; virtual tokens need a causal decoder")
    config.fit(model_config)
    tables = [name for name, module in inside if _is_position_table(module, name)]
    return [path, *attentions, *(tables if model_config.model_type in LEARNED else [])]


def _decoder(model: Any, config: VirtualTokensConfig) -> Any:
    """The module that holds the layers. Raises ValueError for a model that cannot have virtual tokens."""
    kind = type(config).__name__.removesuffix("Config")
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is None:
        raise ValueError(f"{kind} needs a transformers model, got {type(model).__name__}")
    text = model.config.get_text_config()
    if model.config.is_encoder_decoder or getattr(text, "add_cross_attention", False):
        raise ValueError(
            f"{kind} works on decoders alone; {type(model).__name__} is an encoder-decoder, where it is not decided "
            "which of the two texts the virtual tokens belong to"
        )
    if text.model_type not in ROTARY + LEARNED:
        raise ValueError(
            f"{kind} does not know how a model of type {text.model_type!r} tells positions; it works on "
            f"{', '.join(sorted(ROTARY + LEARNED))}"
        )
    return model.get_decoder()


def is_self_attention(module: Any) -> bool:
    """Whether `module` is a decoder layer's self-attention, as transformers writes them."""
    if not hasattr(module, "layer_idx") or not hasattr(module, "is_causal"):
        return False
    return cache_argument(module) is not None and not getattr(module, "is_cross_attention", False)


def _is_position_table(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Embedding) and path.rpartition(".")[2] in ("wpe", "embed_positions")


def _mixin_for(module: Any) -> type[AdapterModule]:
    if is_self_attention(module):
        return PrefixedAttention
    if isinstance(module, nn.Embedding):
        return ShiftedOffset if hasattr(module, "offset") else ShiftedPositions
    return VirtualTokensDecoder


def _connect(model: Any, adapter: str, targets: list[str]) -> None:
    decoder = model.get_submodule(targets[0])
    rotary = getattr(decoder, "rotary_emb", None)
    for path in targets[1:]:
        module = model.get_submodule(path)
        # SmolLM3 leaves every fourth layer without rotation.
        rotates = getattr(module, "use_rope", True)
        rotation = Rotation(rotary, module) if rotary is not None and rotates else None
        module.connect(adapter, decoder.prompt_encoder[adapter], rotation)


VIRTUAL_TOKENS = Method(find=_find, mixin_for=_mixin_for, connect=_connect)

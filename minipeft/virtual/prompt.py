"""Prompt tuning: P learned vectors in front of the text's embeddings (Lester et al. 2021).

    [P_e; X_e], (P + n) x e, goes through the model in the place of X_e        (section 2)

In a causal decoder nothing that comes later changes what the model makes of P_e: at every layer the text sees no more
of it than its keys and values, the same for each row. So P_e goes through the model alone, once a call, and what it
leaves stands before the text as a prefix does (`attention.py`). That is the same function as putting P_e into the
batch, and gives the rest for nothing: padding stays in front of the prompt, and ids, mask, labels, logits and the
cache are about the text alone. It costs P tokens a call instead of P a row. In generation the keys and values stay
with the cache, as those of ordinary tokens would.

Two things differ from putting it into the batch, as PEFT does. The text's first token is no target (PEFT scores it
from the prompt's last position; a first label of -100 gives equal losses). And a sliding window never moves past the
prompt. A text that is read in both directions needs the prompt in the batch: see `encoders.py`.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule, Method
from minipeft.dispatched import device_of
from minipeft.virtual.decoders import VirtualTokensDecoder, attention_mixin, connect_attention, decoder_targets
from minipeft.virtual.encoders import PromptedEncoder, connect_prompt, prompt_mixin, prompt_targets
from minipeft.virtual.tokens import Sizes, VirtualTokensConfig


class PromptTuningInit(str, enum.Enum):
    """The start of a prompt: a text's embeddings, those of random tokens, or normal numbers."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclasses.dataclass
class PromptTuningConfig(VirtualTokensConfig):
    """PEFT's `PromptTuningConfig`: the same names, defaults and JSON.

    Args:
        num_virtual_tokens: P, the length of the prompt.
        prompt_tuning_init: TEXT, SAMPLE_VOCAB or RANDOM (normal numbers, PEFT's default and the worst start).
        prompt_tuning_init_text: For TEXT: cut after P tokens, or repeated.
        tokenizer_name_or_path: For TEXT.
        tokenizer_kwargs: For TEXT: arguments of `AutoTokenizer.from_pretrained`.

    The other fields are filled in from the model. Raises ValueError for values out of range.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [kind.value for kind in PromptTuningInit]
        if self.prompt_tuning_init not in kinds:
            raise ValueError(f"prompt_tuning_init must be one of {kinds}, got {self.prompt_tuning_init!r}")
        self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        for field in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if not isinstance(getattr(self, field), str | None):
                raise ValueError(f"{field} must be text, got {getattr(self, field)!r}")
        if not isinstance(self.tokenizer_kwargs, dict | None):
            raise ValueError(f"tokenizer_kwargs must be a mapping, got {self.tokenizer_kwargs!r}")
        from_text = self.prompt_tuning_init is PromptTuningInit.TEXT
        for field in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if from_text and not getattr(self, field):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {field}, got {getattr(self, field)!r}")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs is for prompt_tuning_init='TEXT' alone")
        if "trust_remote_code" in (self.tokenizer_kwargs or ()):
            raise ValueError("tokenizer_kwargs: trust_remote_code would let an adapter's file run code")

    @classmethod
    def completed(cls, arguments: Mapping[str, Any], model: str) -> dict[str, Any]:
        from_text = {"prompt_tuning_init": PromptTuningInit.TEXT, "tokenizer_name_or_path": model}
        return {**arguments, **(from_text if "prompt_tuning_init_text" in arguments else {})}

    def positions_taken(self, model_type: str) -> int:
        """P: a prompt is a text in front of the text."""
        return self.num_virtual_tokens or 0

    def fit(self, sizes: Sizes) -> None:
        self._check_positive_int("num_virtual_tokens")
        self._settle("token_dim", sizes.embedding or sizes.hidden)
        self._settle("num_attention_heads", sizes.queries)
        self._settle("num_layers", sizes.layers)
        # PEFT counts an encoder-decoder as two, and then trains P more vectors that it never uses.
        both = sizes.submodules == self.num_transformer_submodules == 2
        self._settle("num_transformer_submodules", 2 if both else 1)

    def make_encoder(self, holder: Any, dtype: torch.dtype, init: bool) -> nn.Module:
        assert self.num_virtual_tokens and self.token_dim
        words = holder.get_input_embeddings()
        unused = (self.num_transformer_submodules or 1) - 1
        encoder = PromptEncoder(self.num_virtual_tokens, self.token_dim, unused).to(device_of(words), dtype)
        if init:
            self._start(encoder.embedding.weight, words)
        return encoder

    @torch.no_grad()
    def _start(self, prompt: Tensor, words: nn.Embedding) -> None:
        """Give `prompt`, (P, hidden), its start values."""
        if self.prompt_tuning_init is PromptTuningInit.RANDOM:
            nn.init.normal_(prompt)
            return
        if self.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(words.num_embeddings, (len(prompt),))
        else:
            ids = torch.tensor(self._text_ids(len(prompt)))
        # As the model looks them up: Gemma's embeddings are scaled.
        prompt.copy_(words(ids.to(prompt.device)))

    def _text_ids(self, number: int) -> list[int]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **(self.tokenizer_kwargs or {}))
        ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not ids:
            raise ValueError(f"prompt_tuning_init_text {self.prompt_tuning_init_text!r} has no tokens")
        return list(itertools.islice(itertools.cycle(ids), number))


class _Passing(list):
    """Results of the last call. A copy of the model, also one in a file, has made no call yet."""

    def __reduce__(self) -> Any:
        return _Passing, ()


class PromptEncoder(nn.Module):
    """The tensors of one prompt.

    Attributes:
        embedding: weight (P, hidden); further rows, as PEFT has for encoder-decoders, are not used.
        key_values: per layer what the model makes of it, two (heads, P, head_dim); set anew in every call.
    """

    def __init__(self, length: int, hidden: int, unused: int = 0):
        super().__init__()
        self.length = length
        self.embedding = nn.utils.skip_init(nn.Embedding, length * (1 + unused), hidden)
        self.key_values: list[tuple[Tensor, Tensor]] = _Passing()

    @property
    def ready(self) -> bool:
        """True once the prompt has been through the model in this call."""
        return bool(self.key_values)

    def forget(self) -> None:
        """Begin a call."""
        self.key_values = _Passing()

    def prepare(self, run: Callable[..., list[tuple[Tensor, Tensor]]], dtype: torch.dtype, cache: Any) -> None:
        """Get the keys and values ready for one call.

        Args:
            run: Embeddings (1, P, hidden), as `inputs_embeds`, -> keys and values.
            dtype: The model's.
            cache: What the call is given; keys and values that are part of it are not made again.
        """
        remembers = cache is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        made = getattr(cache, "_prompts", {}) if remembers else {}
        weight = self.embedding.weight
        of, version, known = made.get(id(weight), (None, None, None))
        if of is not weight or version != weight._version or not _in_use(cache):
            known = run(inputs_embeds=weight.to(dtype)[None])
            if remembers:
                cache._prompts = {**made, id(weight): (weight, weight._version, known)}
        self.key_values = _Passing(known)

    def key_value(self, layer: int) -> tuple[Tensor, Tensor]:
        """Two (heads, P, head_dim): the keys, rotated for positions from 0, and values of `layer`."""
        return self.key_values[layer]

    def state(self) -> dict[str, Tensor]:
        """The live tensors, which are what PEFT's file holds."""
        return {"/prompt_embeddings": self.embedding.weight}

    def flat(self, values: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        """(P, hidden): the prompt, with `values(tensor)` in the place of each live tensor."""
        return values(self.embedding.weight)


def _in_use(cache: Any) -> bool:
    """True if `cache` holds tokens: an emptied cache begins a new text."""
    return bool(cache.get_seq_length() > 0)


def _find(model: Any, config: VirtualTokensConfig, skip: list[str]) -> list[str]:
    return prompt_targets(model, config) or decoder_targets(model, config)


def _mixin_for(module: Any) -> type[AdapterModule]:
    return prompt_mixin(module) or attention_mixin(module) or VirtualTokensDecoder


def _connect(model: Any, adapter: str, targets: list[str]) -> None:
    connect = connect_prompt if isinstance(model.get_submodule(targets[0]), PromptedEncoder) else connect_attention
    connect(model, adapter, targets)


PROMPTS = Method(find=_find, mixin_for=_mixin_for, connect=_connect)

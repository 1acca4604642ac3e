"""Learned keys and values in front of an attention module's own: what prefix and prompt tuning have in common.

A causal decoder's layer computes softmax(q [K_p; K]^T) [V_p; V]: the text attends to P virtual tokens whose keys K_p
and values V_p come from an adapter (Li and Liang 2021, equation 3). PEFT puts them into the cache that the user sees.
Here they are put in front of the keys at the last moment, inside each attention module: the module is handed a view
of its cache whose `update` returns [prefix; cached; new], and a mask with P more columns. So the user's cache, mask,
positions and labels are about the text alone, with any cache class, without a cache, and under gradient checkpointing.

Positions: the virtual tokens stand before the text, the last of them at position -1. PEFT puts them at 0..P-1 and
moves the text up by P; a rotary score depends on the distance alone, so turning the learned keys back by P gives the
same scores. Learned position tables know no distance, and neither do rotations whose frequencies depend on the length
of the text: there the text does move up by P (`ShiftedPositions`, `PrefixedRotary`). ALiBi adds a bias by distance to
the scores, which is continued to the left.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minipeft.adapter import AdapterModule
from minipeft.compat import CACHE_NAMES
from minipeft.mixins import plain_class
from minipeft.virtual.masks import columns_of, widened_mask


class PrefixedCache:
    """A view of `cache` (or of none) with a prefix in front, handed to an attention module as its cache.

    Args:
        key, value: (heads, P, head_dim), P may be 0.
        columns: The number of keys that the mask is for; None if it does not say.
        record: The module's own new keys and values (batch, heads, tokens, head_dim) are put here.
    """

    def __init__(self, cache: Any, key: Tensor | None, value: Tensor | None, columns: int | None, record: list | None):
        self.cache, self.key, self.value, self.columns, self.record = cache, key, value, columns, record

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Keys before the new ones: T5 asks, to tell its queries' positions."""
        before = 0 if self.key is None else self.key.shape[1]
        return before + (0 if self.cache is None else self.cache.get_seq_length(layer_idx))

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(batch, heads, tokens, head_dim) new ones -> (batch, heads, P + cached + tokens, head_dim) all.

        Raises ValueError when the mask is not for so many keys.
        """
        if self.record is not None:
            self.record.append((key, value))
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        if self.key is not None and self.value is not None:
            key, value = _in_front(self.key, key), _in_front(self.value, value)
        if self.columns is not None and self.columns != key.shape[2]:
            raise ValueError(
                f"the attention mask is for {self.columns} keys, but there are {key.shape[2]} with the virtual tokens"
            )
        return key, value


class _Borrowed:
    """The number of another layer's keys, (batch, heads, length + keys, head_dim), as a mask asks for it."""

    def __init__(self, keys: Tensor, length: int) -> None:
        self.keys = keys.shape[2] - length

    def get_mask_sizes(self, queries: int, layer_idx: int) -> tuple[int, int]:
        """(keys, 0), as a cache's."""
        return self.keys, 0


def _in_front(prefix: Tensor, states: Tensor) -> Tensor:
    batch = states.shape[0]
    return torch.cat([prefix.to(states).expand(batch, -1, -1, -1), states], dim=2)


class Rotation:
    """A decoder's rotation of keys by their position, for one layer (RoPE, Su et al. 2021, section 3.2).

    The model's own functions do it, so every layout of the rotated features and every base frequency is right.
    """

    def __init__(self, rotary: nn.Module, attention: nn.Module):
        self.rotary, self.home = rotary, plain_class(attention).__module__
        takes_type = "layer_type" in inspect.signature(type(rotary).forward).parameters
        kind = getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None)
        self.options = {"layer_type": kind} if takes_type else {}
        # Phi and StableLM rotate the first features alone; others that do so leave it to the function.
        self.features: int | None = getattr(attention, "rotary_ndims", None)
        self._find_functions()

    def _find_functions(self) -> None:
        # The function without its decorators, which may choose new frequencies for the positions that they see: the
        # prefix must be turned by the frequencies that the text is rotated by right now.
        self.angles = inspect.unwrap(type(self.rotary).forward)
        functions = vars(sys.modules[self.home])
        self.apply = functions.get("apply_rotary_pos_emb") or functions["apply_rotary_emb"]
        self.alone = "k" not in inspect.signature(self.apply).parameters

    def __getstate__(self) -> dict[str, Any]:
        return {"rotary": self.rotary, "home": self.home, "options": self.options, "features": self.features}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find_functions()

    def back(self, key: Tensor, by: int) -> Tensor:
        """(heads, tokens, head_dim) -> the same, float32 or wider: every key turned to a position `by` lower."""
        key = key.to(torch.promote_types(key.dtype, torch.float32))[None]
        position = torch.full((1, 1), -by, device=key.device)
        angles = self.angles(self.rotary, key, position, **self.options)
        if torch.is_tensor(angles):
            # Llama 4's are complex numbers, for (batch, tokens, heads, features).
            turned = key.transpose(1, 2)
            return self.apply(turned, turned, angles / angles.abs())[1].transpose(1, 2)[0]
        cos, sin = angles
        # Some variants (YaRN) scale what they rotate; the learned keys are only to be turned.
        length = (cos.square() + sin.square()).sqrt()
        cos, sin = cos / length, sin / length
        turned, left = key[..., : self.features], key[..., self.features or key.shape[-1] :]
        turned = self.apply(turned, cos, sin) if self.alone else self.apply(turned, turned, cos, sin)[1]
        return torch.cat([turned, left], dim=-1)[0]


class TableRotation:
    """GPT-J's rotation, by a table of sines and cosines for every position, which `holder` has."""

    def __init__(self, attention: Any, holder: Any) -> None:
        self.attention, self.holder = attention, holder

    def back(self, key: Tensor, by: int) -> Tensor:
        """As `Rotation.back`."""
        key = key.to(torch.promote_types(key.dtype, torch.float32))
        apply = sys.modules[plain_class(self.attention).__module__].apply_rotary_pos_emb
        sin, cos = self.holder.embed_positions[by].to(key).chunk(2)
        rotated = 2 * len(sin)
        turned, left = key[..., :rotated], key[..., rotated:]
        # (heads, tokens, features) -> (1, tokens, heads, features) and back.
        turned = apply(turned.transpose(0, 1)[None], -sin[None, None], cos[None, None])[0].transpose(0, 1)
        return torch.cat([turned, left], dim=-1)


def depends_on_length(rotary: Any) -> bool:
    """True for a rotation whose frequencies depend on the length of the text: dynamic NTK, Phi-3's longrope."""
    kinds = getattr(rotary, "rope_type", None)
    return not {"dynamic", "longrope"}.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds])


def layer_number(module: Any) -> Any:
    """The number of an attention module's layer, None for another module. GPT-Neo has a name of its own for it."""
    return getattr(module, "layer_idx", getattr(module, "layer_id", None))


def cache_argument(module: nn.Module) -> str | None:
    """The name of the attention module's cache argument, or None if it takes none."""
    return next((name for name in CACHE_NAMES if name in argument_names(module)), None)


def argument_names(module: Any) -> list[str]:
    """The names of the arguments of `module`'s own forward, without anything mixed in, in their order."""
    return list(inspect.signature(plain_class(module).forward).parameters)[1:]


class PrefixedAttention(AdapterModule):
    """A self-attention module that sees the virtual tokens of the acting adapters in front of its keys.

    Attributes:
        virtual_tokens: adapter -> its encoder (not registered here: it belongs to the decoder), which has `length`,
            `key_value(layer)` -> two (heads, length, head_dim), and `ready`.
        rotation: How the model turns its keys; None if it does not.
        recorder: A list that is given this module's own keys and values, while they are wanted.
        arguments: The names of the plain forward's arguments.
    """

    name_prefix: ClassVar[str] = "Prefixed"
    _own_attributes: ClassVar[tuple[str, ...]] = ("virtual_tokens", "rotation", "recorder", "arguments")

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "virtual_tokens"):
            self.virtual_tokens: dict[str, Any] = {}
            self.rotation: Rotation | TableRotation | None = None
            self.recorder: list | None = None
            self.arguments = argument_names(self)

    def add_adapter(self, adapter: str, config: Any, path: str, dtype: torch.dtype, init: bool) -> None:
        """Nothing: the tensors are the decoder's (`connect`)."""

    def connect(self, adapter: str, encoder: nn.Module, rotation: Rotation | TableRotation | None) -> None:
        """Take the keys and values of `adapter` from `encoder`."""
        self.virtual_tokens[adapter] = encoder
        self.rotation = rotation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hidden_states (batch, tokens, hidden), with the plain forward's arguments -> its results."""
        encoders = acting_encoders(self)
        if not encoders and self.recorder is None:
            return super().forward(*args, **kwargs)
        kwargs = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        cache_name = next(name for name in CACHE_NAMES if name in self.arguments)
        mask_name = "attention_mask" if "attention_mask" in self.arguments else "mask"  # T5's name
        # The other half of an encoder-decoder's cache is about what its decoder reads.
        cache = kwargs.get(cache_name)
        cache, mask = getattr(cache, "self_attention_cache", cache), kwargs.get(mask_name)
        key = value = None
        if encoders:
            # Gemma 4's last layers look at the keys of an earlier one, its prefix with them.
            borrows = getattr(self, "is_kv_shared_layer", False)
            key, value = (None, None) if borrows else self._prefix(encoders)
            length = sum(encoder.length for encoder in encoders)
            causal = kwargs.get("is_causal", getattr(self, "is_causal", True))
            counted = _Borrowed(kwargs["shared_kv_states"][self.layer_type][0], length) if borrows else cache
            mask = widened_mask(self, mask, length, kwargs["hidden_states"], counted, causal)
            if kwargs.get("alibi") is not None:
                kwargs["alibi"] = self._continued(kwargs["alibi"], length)
        kwargs[cache_name] = PrefixedCache(cache, key, value, columns_of(mask), self.recorder)
        return super().forward(**{**kwargs, mask_name: mask})

    def _continued(self, alibi: Tensor, length: int) -> Tensor:
        """(batch * heads, 1, keys), a slope times the key's position -> the same with positions -length..-1 in front.

        Press et al. 2022, section 3.
        """
        slopes = sys.modules[plain_class(self).__module__]._get_alibi_slopes(self.num_heads, alibi.device)
        before = slopes[:, None, None] * torch.arange(-length, 0, device=alibi.device)
        return torch.cat([before.to(alibi).repeat(alibi.shape[0] // len(slopes), 1, 1), alibi], dim=-1)

    def _prefix(self, encoders: list[Any]) -> tuple[Tensor, Tensor]:
        """Two (heads, P, head_dim): keys, turned to positions -P..-1, and values of all that act, in their order."""
        keys, values, after = [], [], sum(encoder.length for encoder in encoders)
        for encoder in encoders:
            key, value = encoder.key_value(layer_number(self))
            if (projection := getattr(self, "k_proj", None)) is not None and hasattr(self, "head_dim"):
                # Gemma 4's layers are of two shapes; a prefix has the larger one for all.
                heads = projection.out_features // self.head_dim
                key, value = key[:heads, :, : self.head_dim], value[:heads, :, : self.head_dim]
            keys.append(key if self.rotation is None else self.rotation.back(key, by=after))
            values.append(value)
            after -= encoder.length
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self.virtual_tokens.pop(adapter, None)


class ShiftedPositions(AdapterModule):
    """A learned position table (GPT-2's `wpe`): the text stands after the virtual tokens that act."""

    name_prefix: ClassVar[str] = "Shifted"
    _own_attributes: ClassVar[tuple[str, ...]] = ("virtual_tokens",)

    num_embeddings: int
    padding_idx: int | None

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "virtual_tokens"):
            self.virtual_tokens: dict[str, Any] = {}

    def add_adapter(self, adapter: str, config: Any, path: str, dtype: torch.dtype, init: bool) -> None:
        """Nothing but a check: there must be positions left for the text."""
        if config.num_virtual_tokens >= self.num_embeddings:
            raise ValueError(
                f"num_virtual_tokens={config.num_virtual_tokens} leaves no position for the text: {path} has "
                f"{self.num_embeddings}"
            )

    def connect(self, adapter: str, encoder: nn.Module, rotation: Rotation | TableRotation | None) -> None:
        """Count the virtual tokens of `adapter`."""
        self.virtual_tokens[adapter] = encoder

    def shift(self) -> int:
        """The number of virtual tokens that act."""
        return sum(encoder.length for encoder in acting_encoders(self))

    def forward(self, position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """position_ids (batch, tokens) of the text -> (batch, tokens, hidden), moved up by the virtual tokens.

        RoBERTa's padding is at one position, which it keeps: a loss over all positions reads what is made of it.
        """
        moved = position_ids + self.shift()
        if self.padding_idx is not None:
            moved = torch.where(position_ids == self.padding_idx, position_ids, moved)
        with self._fitting():
            return super().forward(moved, *args, **kwargs)

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """Say what an index outside of the table means. On a GPU torch itself ends the process."""
        try:
            yield
        except IndexError as error:
            raise ValueError(
                f"the text is too long: the model has {self.num_embeddings} positions, of which {self.shift()} are the "
                "virtual tokens'"
            ) from error

    def delete_adapter(self, adapter: str) -> None:
        super().delete_adapter(adapter)
        self.virtual_tokens.pop(adapter, None)


class ShiftedOffset(ShiftedPositions):
    """OPT's position table, which counts positions by the mask and then adds its own `offset`."""

    @property
    def offset(self) -> int:
        """The table's offset and the virtual tokens that act."""
        return self.__dict__["offset"] + self.shift()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The table's own forward, which adds `offset` to the positions."""
        with self._fitting():
            return super(ShiftedPositions, self).forward(*args, **kwargs)


class PrefixedRotary(ShiftedPositions):
    """A rotary embedding whose frequencies depend on the length of the text: the text stands after the virtual tokens.

    Attributes:
        expected: The length of the whole text, while a prompt that belongs to it goes through the model alone.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("expected",)

    expected: int | None

    def attach(self, switch: Any) -> None:
        super().attach(switch)
        if not hasattr(self, "expected"):
            self.expected = None

    def add_adapter(self, adapter: str, config: Any, path: str, dtype: torch.dtype, init: bool) -> None:
        """Nothing: there is no last position."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The cosines and sines of the text's positions, (batch, tokens, features) each."""
        positions = position_ids + self.shift()
        if self.expected is None:
            return super(ShiftedPositions, self).forward(x, positions, *args, **kwargs)
        # The plain forward chooses the frequencies by the last position; without its decorator it keeps them.
        last = positions.new_full((1, 1), self.expected - 1)
        super(ShiftedPositions, self).forward(x, last, *args, **kwargs)
        plain: Any = plain_class(self)
        return inspect.unwrap(plain.forward)(self, x, positions, *args, **kwargs)


def acting_encoders(module: Any) -> list[Any]:
    """The encoders of `module` whose virtual tokens are seen now, in the order of the active adapters."""
    if module.merged_adapters:
        return []
    found = (module.virtual_tokens.get(adapter) for adapter in module.switch.acting)
    return [encoder for encoder in found if encoder is not None and encoder.ready]

"""Attention masks with virtual tokens in front, for each attention implementation of transformers.

- eager and sdpa take a mask of numbers, (batch, heads, queries, keys), or none: P columns are put before it.
- flash_attention_2 and _3 take one of padding alone, (batch, keys), or none. Their kernels let the last query see the
  last key ("aligned to the bottom right corner", says flash-attn's documentation), so P more keys in front are seen by
  all queries without being told. Two things cannot be said there and raise: a sliding window over the text alone, and
  packed documents, each of which would need the virtual tokens before it.
- flex_attention takes a `BlockMask` made of a function of indices: it is asked about the keys P places before.

flash-attn itself was never run here: it needs a GPU. The tests call a stand-in, written after its documentation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_FLASH = ("flash_attention_2", "flash_attention_3")
IMPLEMENTATIONS = ("eager", "sdpa", *_FLASH, "flex_attention")


def check_implementation(config: Any) -> None:
    """Raise ValueError, by name, for an attention implementation that would not see the virtual tokens rightly."""
    kind = config._attn_implementation
    if kind not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {kind!r} does not work with virtual tokens; use one of {IMPLEMENTATIONS}: "
            "model.set_attn_implementation('sdpa')"
        )
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kind in _FLASH and window is not None and (layers is None or "sliding_attention" in layers):
        raise ValueError(
            f"attention implementation {kind!r} would let the sliding window of {window} tokens pass the virtual "
            "tokens: model.set_attn_implementation('sdpa')"
        )


def check_packing(config: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for packed documents (told by the arguments of a decoder's call) that flash would get wrong."""
    if config._attn_implementation not in _FLASH or kwargs.get("attention_mask") is not None:
        return
    positions = kwargs.get("position_ids")
    restarts = positions is not None and len(positions) == 1 and bool((positions.diff() != 1).any())
    if restarts or kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"attention implementation {config._attn_implementation!r} cannot put virtual tokens before each of "
            "several packed documents: model.set_attn_implementation('sdpa')"
        )


def widened_mask(module: Any, mask: Any, length: int, states: Tensor, cache: Any, causal: bool) -> Any:
    """`mask` for an attention call with `length` virtual tokens in front of its keys: every query sees them.

    Args:
        mask: (batch or 1, heads or 1, queries, keys), boolean (True is visible) or added to the scores; (batch, keys)
            for flash; a `BlockMask` for flex; None where the attention implementation knows what is visible by itself.
        states: (batch, queries, hidden), the hidden states that the module gets.
        causal: Whether it then shows a query no later key.

    Raises ValueError for a mask of another kind.
    """
    kind, queries = _implementation(module), states.shape[1]
    if kind == "flex_attention":
        return None if mask is None else _widened_block_mask(mask, length)
    if kind in _FLASH and mask is None:
        return None
    if mask is None:
        if kind == "eager" or queries == 1 or not causal:
            return None  # everything is visible
        # sdpa's own causal pattern starts at the first key, which is the prefix's now: spell it out.
        keys = queries if cache is None else cache.get_mask_sizes(queries, getattr(module, "layer_idx", 0))[0]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=states.device).tril()[None, None]
    if not torch.is_tensor(mask) or mask.dim() != (2 if kind in _FLASH else 4) or not _visible_or_added(mask, kind):
        shape = f"{mask.dtype} {tuple(mask.shape)}" if torch.is_tensor(mask) else type(mask).__name__
        expected = "(batch, keys)" if kind in _FLASH else "(batch, heads, queries, keys), boolean or floating"
        raise ValueError(f"expected an attention mask {expected}, got {shape}")
    added = mask.is_floating_point() and kind not in _FLASH
    seen = mask.new_full((*mask.shape[:-1], length), 0.0 if added else 1)
    return torch.cat([seen, mask], dim=-1)


def _implementation(module: Any) -> str:
    """The attention implementation of an attention module; Bloom's, which has no config, is eager."""
    return getattr(getattr(module, "config", None), "_attn_implementation", "eager")


def _visible_or_added(mask: Tensor, kind: str) -> bool:
    return kind in _FLASH or mask.dtype == torch.bool or mask.is_floating_point()


def _widened_block_mask(mask: Any, length: int) -> BlockMask:
    if not isinstance(mask, BlockMask):
        raise ValueError(f"expected a BlockMask for flex_attention, got {type(mask).__name__}")
    # All layers of a call are given the same mask.
    made: tuple[int, BlockMask] | None = getattr(mask, "_with_virtual_tokens", None)
    if made is None or made[0] != length:
        plain, (queries, keys), device = mask.mask_mod, mask.seq_lengths, mask.kv_num_blocks.device

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key < length) | plain(batch, head, query, (key - length).clamp(min=0))

        batch, heads = mask.kv_num_blocks.shape[:2]
        made = length, create_block_mask(visible, batch, heads, queries, keys + length, device=device)
        mask._with_virtual_tokens = made  # type: ignore[attr-defined]
    return made[1]


def columns_of(mask: Any) -> int | None:
    """The number of keys that a mask is for, if it must be for all of them (a padding mask may be for fewer)."""
    return None if mask is None or (torch.is_tensor(mask) and mask.dim() == 2) else mask.shape[-1]

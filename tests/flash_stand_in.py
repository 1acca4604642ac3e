"""flash-attn's two functions as its documentation says they work, on a CPU, and transformers made to call them."""

import collections
import functools
from typing import Any

import pytest
import torch
import transformers.integrations.flash_attention as flash_integration
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor

_SUPPORTED = ("dropout_p", "max_seqlen_q", "max_seqlen_k")


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False
) -> Tensor:
    """(batch, queries, heads, dim), (batch, keys, kv heads, dim) twice -> (batch, queries, heads, dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if causal:
        # "aligned to the bottom right corner of the attention matrix"
        seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    **how: Any,
) -> Tensor:  # fmt: skip
    """The same for rows of any length, one after the other: (tokens, heads, dim)."""
    ends = zip(
        cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:], strict=False
    )
    rows = [flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **how)[0] for a, b, c, d in ends]
    return torch.cat(rows)


def use_flash(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`model` as after `set_attn_implementation("flash_attention_2")`, with the functions above for flash-attn's."""
    supported = collections.defaultdict(bool, dict.fromkeys(_SUPPORTED, True))
    process = functools.partial(flash_utils._process_flash_attention_kwargs, supports_mapping=supported)
    functions = flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *a, **k: (functions, (process, process)))
    # It looks for the 16 bits to turn float32 into, which flash-attn needs and this does not.
    monkeypatch.setattr(flash_integration, "get_target_dtype", lambda query, module: None)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = "flash_attention_2"
    return model

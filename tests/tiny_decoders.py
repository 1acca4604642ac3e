"""A tiny random decoder of each family that virtual tokens work on, in eval mode."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tiny import VOCABULARY

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# head_dim is not hidden_size / num_attention_heads in these, as in the real ones.
_WIDE = {**_SIZES, "head_dim": 16}
_UNGROUPED = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}


def _gemma3(**changes: Any) -> Any:
    types = ["sliding_attention", "full_attention"]
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**{**_WIDE, "layer_types": types, "sliding_window": 8, **changes}))


_MAKE: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SIZES, **k})),
    "llama_yarn": lambda **k: hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SIZES, "rope_parameters": _YARN, **k})),
    "mistral": lambda **k: hf.MistralForCausalLM(hf.MistralConfig(**{**_SIZES, "sliding_window": 8, **k})),
    "qwen2": lambda **k: hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**_SIZES, **k})),
    "qwen3": lambda **k: hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**_WIDE, **k})),
    "gemma": lambda **k: hf.GemmaForCausalLM(hf.GemmaConfig(**{**_WIDE, **k})),
    "gemma2": lambda **k: hf.Gemma2ForCausalLM(hf.Gemma2Config(**{**_WIDE, "sliding_window": 8, **k})),
    "gemma3": _gemma3,
    "phi3": lambda **k: hf.Phi3ForCausalLM(hf.Phi3Config(**{**_SIZES, **k})),
    "smollm3": lambda **k: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**{**_SIZES, "no_rope_layers": [1, 0], **k})),
    "olmo2": lambda **k: hf.Olmo2ForCausalLM(hf.Olmo2Config(**{**_SIZES, **k})),
    "granite": lambda **k: hf.GraniteForCausalLM(hf.GraniteConfig(**{**_SIZES, **k})),
    "mixtral": lambda **k: hf.MixtralForCausalLM(hf.MixtralConfig(**{**_SIZES, "num_local_experts": 4, **k})),
    "qwen3_moe": lambda **k: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**_WIDE, **_EXPERTS, **k})),
    "gpt_neox": lambda **k: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**{**_UNGROUPED, **k})),
    "gpt2": lambda **k: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **{
                **_UNGROUPED,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 64,
                "tie_word_embeddings": False,
                **k,
            }
        )
    ),
    "opt": lambda **k: hf.OPTForCausalLM(
        hf.OPTConfig(**{**_UNGROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, **k})
    ),
}
FAMILIES = tuple(_MAKE)


def tiny_decoder(family: str, seed: int = 0, attention: str | None = None, **changes: Any) -> Any:
    """A 2-layer model of `family`; the same weights for the same arguments."""
    torch.manual_seed(seed)
    model = _MAKE[family](**changes).eval()
    if attention is not None:
        model.set_attn_implementation(attention)
    # Random models of this size say the same whatever they read; larger weights make them differ.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if "embed" not in name and "wpe" not in name else 2.0)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model

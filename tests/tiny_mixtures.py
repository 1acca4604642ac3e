"""Tiny mixtures of experts whose routers, or whose names in files, are unlike those of most."""

from typing import Any

from tiny_families import Family

_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
_GEMMA: dict[str, Any] = {
    **{"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 16},
    **{"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
}
_LATENT: dict[str, Any] = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"num_key_value_heads": 4, "head_dim": 16, "num_layers": 1, "num_hidden_layers": 2},
}
MIXTURES = {
    "qwen2_moe": Family("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "gemma4": Family("gemma4_text", {**_EXPERTS, **_FULL, **_GEMMA}),
    "afmoe": Family("afmoe", {**_EXPERTS, **_FULL, "num_dense_layers": 0, "num_shared_experts": 1}),
    "longcat_flash": Family(
        "longcat_flash",
        {
            **_LATENT,
            "ffn_hidden_size": 96,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 1,
            "expert_ffn_hidden_size": 32,
        },
    ),
    "jetmoe": Family(
        "jetmoe",
        {
            "num_key_value_heads": 4,
            "kv_channels": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
        },
    ),
    "granitemoe": Family("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoeshared": Family("granitemoeshared", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "aria": Family("aria_text", {"moe_num_experts": 4, "moe_topk": 2}),
}

"""A tiny random model of each family of models, and a batch that it takes."""

import dataclasses
from typing import Any

import torch
import transformers
from tiny import VOCABULARY, some_ids

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_T5: dict[str, Any] = {
    **{"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2},
    **{"decoder_start_token_id": 0, "pad_token_id": 0},
}
# These configs know no such number.
_UNGROUPED: dict[str, Any] = {"num_key_value_heads": None}
# Shorter than the batch's rows, so that the window cuts.
_SLIDING: dict[str, Any] = {"sliding_window": 4, "head_dim": 16}


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family is built: `model_type` for transformers, what differs from the common sizes, its task."""

    model_type: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    task_type: str = "CAUSAL_LM"

    def build(self, layers: int = 2) -> Any:
        """A model in eval mode; the same weights at every call."""
        torch.manual_seed(0)
        sizes = {**_SIZES, "num_hidden_layers": layers, **self.changes}
        config = transformers.AutoConfig.for_model(self.model_type, **sizes)
        auto = {
            "CAUSAL_LM": transformers.AutoModelForCausalLM,
            "SEQ_CLS": transformers.AutoModelForSequenceClassification,
            "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        }[self.task_type]
        return auto.from_config(config).eval()

    def batch(self) -> dict[str, torch.Tensor]:
        """Two rows, the second padded on the right, with labels for the task."""
        ids = some_ids()
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        labels = torch.tensor([0, 2]) if self.task_type == "SEQ_CLS" else ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


FAMILIES = {
    "Llama": Family("llama"),
    "Mistral": Family("mistral", {"sliding_window": 4}),
    "Qwen2": Family("qwen2"),
    "Qwen3": Family("qwen3", {"head_dim": 16}),
    "Gemma 2": Family("gemma2", {**_SLIDING, "query_pre_attn_scalar": 16}),
    "Gemma 3": Family("gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 16}),
    "Phi3": Family("phi3"),
    "SmolLM3": Family("smollm3"),
    "GPT-2": Family("gpt2", _UNGROUPED),
    "OPT": Family("opt", {**_UNGROUPED, "ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "GPT-NeoX": Family("gpt_neox", _UNGROUPED),
    "BERT classifier": Family("bert", {"num_labels": 3, "pad_token_id": 0}, "SEQ_CLS"),
    "T5": Family("t5", _T5, "SEQ_2_SEQ_LM"),
    "Mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": Family("qwen3_moe", {**_EXPERTS, "num_experts": 4}),
}

# Built as one of the above, and known by name.
RELATIVES = {
    "Gemma": Family("gemma", {"head_dim": 16}),
    "OLMo2": Family("olmo2"),
    "Granite": Family("granite"),
    "RoBERTa classifier": Family("roberta", {"num_labels": 3, "pad_token_id": 0}, "SEQ_CLS"),
}

_BART: dict[str, Any] = {
    **{"d_model": 64, "decoder_start_token_id": 1, "pad_token_id": 0, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 4))},
}
_HEADS: dict[str, Any] = {"head_dim": 16}
_CLASSIFIER: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}
_DISTILBERT: dict[str, Any] = {"dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 96}
_MAMBA: dict[str, Any] = {
    **{"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 4},
    **{"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "head_dim": 16},
}
_QWEN2_MOE: dict[str, Any] = {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}

# What LoRA knows the usual targets of, besides.
OTHERS = {
    **{name: Family(name) for name in ("falcon", "stablelm", "phi", "gpt_bigcode", "olmo", "olmo3", "cohere")},
    **{name: Family(name) for name in ("cohere2", "starcoder2", "ernie4_5")},
    **{name: Family(name, _HEADS) for name in ("glm", "glm4", "ministral", "helium", "exaone4")},
    **{name: Family(name, _HEADS) for name in ("hunyuan_v1_dense", "seed_oss")},
    "gemma4_text": Family(
        "gemma4_text", {**_HEADS, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
    ),
    "bloom": Family("bloom", {"n_head": 4, "n_layer": 2}),
    "gptj": Family("gptj", {"rotary_dim": 16}),
    "gpt_neo": Family("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}),
    "codegen": Family("codegen", {"rotary_dim": 16, "n_ctx": 128}),
    "mpt": Family("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "rwkv": Family("rwkv", {"attention_hidden_size": 64, "context_length": 64}),
    "nemotron_h": Family("nemotron_h", _MAMBA),
    "llama4_text": Family("llama4_text", {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 96}),
    "qwen2_moe": Family("qwen2_moe", _QWEN2_MOE),
    "gpt_oss": Family("gpt_oss", {"num_local_experts": 4, "head_dim": 16}),
    "phimoe": Family("phimoe", {"num_local_experts": 4}),
    "mt5": Family("mt5", _T5, "SEQ_2_SEQ_LM"),
    **{name: Family(name, _BART, "SEQ_2_SEQ_LM") for name in ("bart", "mbart")},
    **{
        name: Family(name, _CLASSIFIER, "SEQ_CLS")
        for name in ("xlm-roberta", "xlm-roberta-xl", "camembert", "layoutlm")
    },
    **{name: Family(name, _CLASSIFIER, "SEQ_CLS") for name in ("deberta", "deberta-v2", "modernbert")},
    **{name: Family(name, {**_CLASSIFIER, "embedding_size": 64}, "SEQ_CLS") for name in ("electra", "albert")},
    "mpnet": Family("mpnet", {**_CLASSIFIER, "pad_token_id": 1}, "SEQ_CLS"),
    "distilbert": Family(
        "distilbert", {**_CLASSIFIER, "dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 96}, "SEQ_CLS"
    ),
}


def tiny_gemma3_with_images() -> Any:
    """Gemma 3 with its vision tower, which has another width and modules of the same names."""
    torch.manual_seed(0)
    text = {**_SIZES, **_SLIDING}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision.update(image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()

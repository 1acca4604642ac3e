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
    "GPT-2": Family("gpt2"),
    "OPT": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "GPT-NeoX": Family("gpt_neox"),
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


def tiny_gemma3_with_images() -> Any:
    """Gemma 3 with its vision tower, which has another width and modules of the same names."""
    torch.manual_seed(0)
    text = {**_SIZES, **_SLIDING}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision.update(image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()

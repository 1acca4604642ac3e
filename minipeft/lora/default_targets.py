"""LoRA's usual targets, by model family: those of a `LoraConfig` that names none."""

from __future__ import annotations

from torch import nn

# By transformers' `config.model_type`: PEFT's choice where PEFT has one.
# Mostly the projections of the queries and of the values, which the LoRA paper found best at a given number of
# parameters (Hu et al. 2021, table 5), or the fused layer that they are part of.
_SEPARATE = (
    *("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text", "llama4", "llama4_text", "smollm3"),
    *("olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2", "glm", "glm4", "stablelm", "starcoder2"),
    *("gpt_oss", "phimoe", "helium", "exaone4", "ernie4_5", "seed_oss", "hunyuan_v1_dense"),
    *("opt", "gptj", "gpt_neo", "bart", "mbart"),
)
_BERTS = ("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "electra", "albert", "layoutlm")

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{family: ["q_proj", "v_proj"] for family in _SEPARATE},
    **{family: ["query", "value"] for family in _BERTS},
    **{family: ["q", "v"] for family in ("t5", "mt5", "mpnet")},
    "distilbert": ["q_lin", "v_lin"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "modernbert": ["Wqkv"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
    "codegen": ["qkv_proj"],
    "mpt": ["Wqkv"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    # An expression: the vision tower's linear layers, of the same names, are wrapped in modules that are no layers.
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    # T5's names and OPT's: either is its language model.
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    # Models whose code comes with their weights.
    **{family: ["query_key_value"] for family in ("chatglm", "RefinedWeb", "RefinedWebModel")},
    "btlm": ["c_proj", "c_attn"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
    # Its name for the receptance's projection is misspelt in transformers, too.
    "rwkv": ["key", "value", "receptance", "output"],
}


def usual_targets(model: nn.Module) -> set[str] | str:
    """The names of the layers that LoRA adapts in `model` unless told otherwise, or an expression for them.

    Raises ValueError for a family without usual targets.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in DEFAULT_TARGETS:
        raise ValueError(f"target_modules must be given: there is no usual choice for model type {family!r}")
    targets = DEFAULT_TARGETS[family]
    return targets if isinstance(targets, str) else set(targets)

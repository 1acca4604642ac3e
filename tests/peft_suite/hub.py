"""Tiny random models under the names that PEFT's tests load, in the layout of Hugging Face's cache.

`python hub.py DIR` fills DIR, which HF_HUB_CACHE then names; with HF_HUB_OFFLINE=1 every `from_pretrained` finds them
there. Weights are drawn from a seed that is the id's; they have nothing to do with those of the hub.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 1024
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {**_COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
_LLAMA = {**_DECODER, "intermediate_size": 64, "max_position_embeddings": 256}
_OPT = {
    **_COMMON,
    **{"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 5, "num_attention_heads": 4},
    **{"max_position_embeddings": 128, "dropout": 0.1},
}
_GPT2 = {**_COMMON, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_BERT = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4},
    **{"intermediate_size": 37, "max_position_embeddings": 512, "pad_token_id": 0},
}
_T5 = {
    **{"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4},
    **{"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}
_BART = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "max_position_embeddings": 100},
    **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    **{"forced_eos_token_id": 2},
}
_WHISPER = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 4, "decoder_ffn_dim": 4, "num_mel_bins": 8},
    **{"max_source_positions": 30, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None},
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 1}

# id -> (transformers' model class, its config's class, the config's fields)
MODELS: dict[str, tuple[str, str, dict]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_OPT, "num_hidden_layers": 12, "hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 4},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_BERT, "intermediate_size": 64},
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {**_COMMON, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_LLAMA, "num_key_value_heads": 2, "hidden_size": 8, "intermediate_size": 32, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen2-0.5B": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        _LLAMA,
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 64},
    ),
    "peft-internal-testing/tiny-random-gemma4-E2B": (
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": {
                **{**_LLAMA, "head_dim": 8, "num_key_value_heads": 1, "num_hidden_layers": 4},
                **{"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
                **{"global_head_dim": 16},
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "vision_config": None,
            "audio_config": None,
        },
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_LLAMA, **_MOE, "head_dim": 8, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_LLAMA, **_MOE, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 64},
    ),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **{**_LLAMA, "num_hidden_layers": 4, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8},
            **{"n_groups": 2, "ssm_state_size": 8, "hybrid_override_pattern": "M*M-", "chunk_size": 16},
        },
    ),
    "tiiuae/falcon-mamba-tiny-dev": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {**_COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        "DebertaConfig",
        {**_BERT, "relative_attention": False, "pos_att_type": ["p2c", "c2p"]},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "DebertaV2Config",
        {**_BERT, "relative_attention": False, "pos_att_type": ["p2c", "c2p"]},
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT,
    ),
    **dict.fromkeys(
        (
            "peft-internal-testing/tiny-random-t5",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "google/flan-t5-small",
            "google/flan-t5-base",
        ),
        ("T5ForConditionalGeneration", "T5Config", _T5),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {**_BERT, "projection_dim": 16, "max_position_embeddings": 77, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
    ),
    **{
        name: (
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": {"model_type": "llama", **_LLAMA},
                "vision_config": {
                    **{"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2},
                    **{"num_attention_heads": 4, "intermediate_size": 37, "image_size": 224, "patch_size": 56},
                },
                "image_token_index": VOCAB - 1,
            },
        )
        for name in (
            "peft-internal-testing/tiny-LlavaForConditionalGeneration",
            "hf-internal-testing/tiny-random-LlavaForConditionalGeneration",
        )
    },
    "peft-internal-testing/base-whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    **{
        f"{owner}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _LLAMA)
        for owner in ("trl-internal-testing", "peft-internal-testing", "hf-internal-testing")
    },
}

_OPT_BASE = "peft-internal-testing/tiny-random-OPTForCausalLM"
_ATTENTION = ["q_proj", "v_proj"]

# id -> (base model, class of the base model, task type, targets)
ADAPTERS: dict[str, tuple[str, str, str | None, list[str]]] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (_OPT_BASE, "OPTForCausalLM", "CAUSAL_LM", _ATTENTION),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": (
        *(_OPT_BASE, "OPTForCausalLM", "CAUSAL_LM"),
        ["embed_tokens", *_ATTENTION],
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": (
        *("peft-internal-testing/tiny-random-T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        *("SEQ_2_SEQ_LM", ["q", "v"]),
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        *(_OPT_BASE, "OPTForSequenceClassification", "SEQ_CLS", _ATTENTION),
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": (
        *(_OPT_BASE, "OPTForQuestionAnswering", "QUESTION_ANS", _ATTENTION),
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": (
        *(_OPT_BASE, "OPTModel", "FEATURE_EXTRACTION", _ATTENTION),
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        *("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2ForTokenClassification"),
        *("TOKEN_CLS", ["c_attn"]),
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        *("peft-internal-testing/base-whisper", "WhisperForConditionalGeneration", None, _ATTENTION),
    ),
    "peft-internal-testing/gpt2-lora-random": (
        *("hf-internal-testing/tiny-random-gpt2", "GPT2LMHeadModel", "CAUSAL_LM", ["c_attn"]),
    ),
    "peft-internal-testing/tiny-opt-lora-revision": (_OPT_BASE, "OPTForCausalLM", "CAUSAL_LM", _ATTENTION),
    "ybelkada/test-st-lora": (_OPT_BASE, "OPTForCausalLM", "CAUSAL_LM", _ATTENTION),
}
# Names of the one snapshot that every id has.
REVISIONS = ("main", "test", "v2.0.0")
SHA = "0" * 39 + "1"


def main(root: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, (model_class, config_class, fields) in MODELS.items():
        _make(root, name, lambda folder, m=model_class, c=config_class, f=fields: _save_model(folder, m, c, f))
    for name, parts in ADAPTERS.items():
        _make(root, name, lambda folder, p=parts: _save_adapter(folder, *p))


def _make(root: Path, name: str, save) -> None:
    home = root / f"models--{name.replace('/', '--')}"
    folder = home / "snapshots" / SHA
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        save(folder)
    except Exception:
        # Its tests will fail with the real PEFT as well, and not count.
        print(f"hub: {name} could not be made", file=sys.stderr)
        traceback.print_exc(limit=-3)
        return
    (home / "refs").mkdir(exist_ok=True)
    for revision in REVISIONS:
        (home / "refs" / revision).write_text(SHA)


def _config(config_class: str, fields: dict):
    return getattr(transformers, config_class)(**copy.deepcopy(fields))


def _save_model(folder: Path, model_class: str, config_class: str, fields: dict) -> None:
    model = getattr(transformers, model_class)(_config(config_class, fields)).eval()
    # Not the small numbers of an untrained model: outputs must depend on inputs by more than the tests' tolerances.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    if "ResNet" in model_class:
        transformers.ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(folder)


def _save_tokenizer(folder: Path) -> None:
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
    )
    fast.save_pretrained(folder)


def _save_adapter(folder: Path, base: str, model_class: str, task: str | None, targets: list[str]) -> None:
    _, config_class, fields = MODELS[base]
    model = getattr(transformers, model_class)(_config(config_class, fields))
    rank, tensors = 8, {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in targets:
            continue
        rows, columns = module.weight.shape
        kind = "lora_{}.weight"
        if isinstance(module, torch.nn.Embedding):
            kind = "lora_embedding_{}"
            rows, columns = columns, rows
        elif type(module).__name__ == "Conv1D":
            rows, columns = columns, rows
        start = f"base_model.model.{path}."
        tensors[start + kind.format("A")] = torch.randn(rank, columns) * 0.1
        tensors[start + kind.format("B")] = torch.randn(rows, rank) * 0.1
    # What PEFT trains whole for the task; all that the model has of them.
    heads = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
    saved = heads.get(task or "")
    for head in saved or []:
        for name, tensor in getattr(model, head).named_parameters() if hasattr(model, head) else ():
            tensors[f"base_model.model.{head}.{name}"] = tensor.detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "auto_mapping": {"base_model_class": model_class, "parent_library": type(model).__module__}
        if not task
        else None,
        "r": rank,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": "gpt2" in base.lower(),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": saved,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2))
    _save_tokenizer(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Tiny models with trained tokenizers of each kind that is written as GGUF, as folders."""

from pathlib import Path
from typing import Any

import torch
from tiny_folder import CHAT_TEMPLATE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 times, isn't it?",
    "Ein Satz mit Umlauten: äöü, und 3,14159 -- 'quoted' text\n\nwith  two   spaces\tand tabs.",
    "def f(x):\n    return x ** 2 + 10  # we'll see\n\n\nEmoji \U0001f600 and 日本語 text.",
]
# As the published tokenizers of Llama 3 and Qwen 2 have it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _split(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, _bytes(False)])


SPLITS = {
    "gpt-2": lambda: _bytes(True),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes(True)]),
    "llama-bpe": lambda: _split(WORDS % "{1,3}"),
    "qwen2": lambda: _split(WORDS % ""),
}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a few texts: one of SPLITS, or "spm" as Llama 2's."""
    if kind == "spm":
        return _sentencepiece()
    inner = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    inner.pre_tokenizer = SPLITS[kind]()
    inner.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        inner.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    inner.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def _sentencepiece() -> PreTrainedTokenizerFast:
    """Merges over characters with ▁ for a space, bytes for what is unknown, and a start token."""
    special = ["<unk>", "<s>", "</s>"]
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=special, show_progress=False, limit_alphabet=60, max_token_length=8
    )
    learned.train_from_iterator([text.encode("ascii", "ignore").decode() for text in TEXTS * 3], trainer)
    import json

    said = json.loads(learned.to_str())["model"]
    tokens = sorted(said["vocab"], key=said["vocab"].get)
    ordered = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *tokens[3:]]
    vocab = {token: id for id, token in enumerate(ordered)}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in said["merges"]]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = learned.normalizer
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama 3.1": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama, linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ),
    "llama, wide heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 128}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
}


def save(folder: Path, family: str = "llama", kind: str = "smollm", dtype: torch.dtype = torch.float32) -> Any:
    """A model whose every weight says something; the model."""
    config_class, model_class, changes = FAMILIES[family]
    tokenizer = tokenizer_of(kind)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": len(tokenizer) + 2}
    torch.manual_seed(0)
    model = model_class(config_class(**(sizes | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.3)
            parameter.copy_(values + 1 if "norm" in name else values)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model

"""A tiny random model with a tokenizer, saved as a folder: what the command line is given in tests."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tiny import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def save_model(folder: Path, seed: int = 0, chat: bool = True, **changes: Any) -> Path:
    """A tiny Llama and the byte tokenizer."""
    tokenizer = byte_tokenizer(chat)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "eos_token_id": 2, "pad_token_id": 0}
    tiny_llama(seed, **(sizes | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path

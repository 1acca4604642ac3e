"""Tiny models, tokenizers and data sets that the training tests share."""

import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minipeft import LoraConfig, get_peft_model
from minipeft.training import EncodedDataset, Example, TrainConfig

VOCABULARY = 97
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The film was very good and very funny.",
    "A very bad film, negative in every way.",
    "positive negative neutral very positive very negative",
    "user assistant system one two three 0123456789",
]


def make_model(adapter=True, dropout=0.0, seed=0, attention="sdpa", dtype=torch.float32, **config):
    """A two-layer Llama, with LoRA whose B is not zero, so that the adapter matters from the first step."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
    # The default 0.02 makes attention so flat that a leak between documents could hide in rounding.
    settings = LlamaConfig(**(sizes | config), initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM._from_config(settings, attn_implementation=attention, dtype=dtype)
    if not adapter:
        return model.eval()
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def make_data(count=20, seed=0, low=4, high=20, max_length=32):
    """Random documents whose second half is learned."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        ids = [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]
        half = len(ids) // 2
        examples.append(Example(ids, [-100] * half + ids[half:]))
    return EncodedDataset(examples, max_length, count)


def make_config(output_dir, **settings):
    """Settings of a run of a few steps, in which everything that can matter is switched on."""
    few = {"batch_size": 2, "gradient_accumulation": 2, "max_steps": 7, "lr": 1e-2, "log_every": 2}
    few |= {"warmup_steps": 2, "scheduler": "cosine", "weight_decay": 0.1, "save_every": 3, "keep_last": None}
    return TrainConfig(model="m", data="d", output_dir=str(output_dir), **(few | settings))


def trained_parameters(model):
    """Copies of the trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE, as GPT-2 and SmolLM2 have it: no token in front, a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def llama_tokenizer():
    """As Llama 2: a start token in front, and a space put in front of every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    inner.train_from_iterator([*CORPUS * 20, "\n = a"], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def spanning_tokenizer():
    """A tokenizer whose tokens reach over spaces, so that prompt and completion can share one."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{1,40}"), "isolated")
    inner.decoder = decoders.Fuse()
    alphabet = sorted({*"".join(CORPUS), "\n"})
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")

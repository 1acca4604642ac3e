"""Tiny models, data sets and settings that the training tests share."""

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minipeft import LoraConfig, get_peft_model
from minipeft.training import EncodedDataset, Example, TrainConfig

VOCABULARY = 97


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

"""Tiny models, data sets and settings that the training tests share."""

import random

import torch
from tiny import VOCABULARY, tiny_llama

from minipeft import LoraConfig, get_peft_model
from minipeft.train import EncodedDataset, Example, TrainConfig


def make_model(adapter=True, dropout=0.0, seed=0, attention="sdpa", dtype=torch.float32, **config):
    """A two-layer Llama, with LoRA whose B is not zero, so that the adapter matters from the first step."""
    # The default 0.02 makes attention so flat that a leak between documents could hide in rounding.
    model = tiny_llama(seed, initializer_range=0.2, attn_implementation=attention, **config).to(dtype)
    if not adapter:
        return model
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

"""Tiny random models of several architectures, saved once a test, and their logits."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from minipeft.nf4 import NF4Linear

# Sizes are multiples of 64, as bitsandbytes' repacking for CPUs with AVX512-BF16 needs.
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_bias": True,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
IDS = torch.arange(18).view(2, 9) * 5 % 96


def tiny(kind="llama", auto=AutoModelForCausalLM, **options):
    """A random model in float32; biases are random too, where they would start at zero."""
    set_seed(0)
    sizes = {"llama": LLAMA, "gpt2": {**GPT2, "bos_token_id": 1, "eos_token_id": 2}}.get(kind, {})
    model = auto.from_config(AutoConfig.for_model(kind, **{**sizes, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model.eval()


def saved(model: PreTrainedModel, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def logits(model):
    model.eval()
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **inputs).logits


def nf4_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]


def edit_tensors(folder, edit):
    """Rewrite the tensors of an unsharded checkpoint: `edit` changes the dictionary in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **options):
    """Change entries of the quantization config in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(options)
    path.write_text(json.dumps(config))

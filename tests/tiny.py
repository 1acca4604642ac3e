"""Tiny random models for the tests: the architecture of the real ones, milliseconds a step."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from minipeft.attach import adapter_parameters

VOCABULARY = 128


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A 2-layer Llama, in eval mode; the same weights for the same seed and changes."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A 2-layer GPT-2 (its projections are Conv1D), in eval mode."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    return GPT2LMHeadModel(config).eval()


def some_ids(rows: int = 2, tokens: int = 9, seed: int = 1) -> torch.Tensor:
    """Random token ids, (rows, tokens)."""
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 2, scale: float = 0.05, adapter: str | None = None) -> None:
    """Move every trainable parameter and all adapters away from their start, so that the adapters do something.

    Args:
        adapter: Move this one alone.
    """
    generator = torch.Generator().manual_seed(seed)
    own = {id(parameter): name for name, parameter in adapter_parameters(model)}
    for parameter in model.parameters():
        name = own.get(id(parameter))
        if name == adapter if adapter else name or parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)

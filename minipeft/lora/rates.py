"""LoRA+ (Hayou et al. 2024): B learns faster than A.

With one learning rate for both, features change by vanishing amounts as the model gets wide; eta_B / eta_A of the order
of the width lets both factors learn (section 4, theorem 1). In practice a fixed ratio near 16 is used (section 5).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minipeft.lora.experts import ExpertFactors
from minipeft.lora.layer import LoraLayer
from minipeft.lora.layers import LoraEmbedding


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """Groups of the parameters that `model` trains, for any torch optimizer.

    Args:
        lr: eta_A, of the factors A and of every matrix that is no factor (a head in modules_to_save).
        loraplus_lr_ratio: eta_B / eta_A. The factors B and all vectors (biases, DoRA's lengths) get lr times this.
        loraplus_weight_decay: Of matrices and DoRA's lengths; biases and norms are not decayed.
        loraplus_lr_embedding: Of both factors on embeddings.

    Raises ValueError when no LoRA factor is trained, and for a ratio that is not positive.
    """
    groups = _four_groups(model, lr, loraplus_lr_ratio, loraplus_weight_decay, loraplus_lr_embedding)
    embedding, fast, _ = _factors_of(model)
    if not any(id(p) in embedding | fast and p.requires_grad for p in model.parameters()):
        raise ValueError("loraplus_lr_ratio is for LoRA: the model trains no LoRA adapter")
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups:
        same = merged.setdefault((group["lr"], group["weight_decay"]), {**group, "params": []})
        same["params"] += group["params"]
    return [group for group in merged.values() if group["params"]]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Any,
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Any:
    """PEFT's function: `optimizer_cls` over four groups, of which some may be empty.

    They are A and whole matrices, the factors on embeddings, B, and vectors, as `lora_plus_groups` describes them; a
    model without LoRA has nothing in the second and the third.

    Args:
        kwargs: Go to the optimizer.

    Raises ValueError for a ratio that is not positive.
    """
    groups = _four_groups(model, lr, loraplus_lr_ratio, loraplus_weight_decay, loraplus_lr_embedding)
    return optimizer_cls(groups, lr=lr, **kwargs)


def _four_groups(model: nn.Module, lr: float, ratio: float, decay: float, lr_embedding: float) -> list[dict[str, Any]]:
    if not ratio > 0:
        raise ValueError(f"loraplus_lr_ratio must be positive, got {ratio}")
    embedding, fast, lengths = _factors_of(model)
    slow: list[nn.Parameter] = []
    of_embeddings: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if id(parameter) in embedding:
            of_embeddings.append(parameter)
        elif id(parameter) in fast | lengths:
            decayed.append(parameter)
        else:
            (slow if parameter.ndim >= 2 else vectors).append(parameter)
    return [
        {"params": slow, "lr": lr, "weight_decay": decay},
        {"params": of_embeddings, "lr": lr_embedding, "weight_decay": decay},
        {"params": decayed, "lr": lr * ratio, "weight_decay": decay},
        {"params": vectors, "lr": lr * ratio, "weight_decay": 0.0},
    ]


def _factors_of(model: nn.Module) -> tuple[set[int], set[int], set[int]]:
    """The identities of the factors on embeddings, of the factors B elsewhere, and of DoRA's lengths."""
    embedding: set[int] = set()
    fast: set[int] = set()
    lengths: set[int] = set()
    for module in model.modules():
        if isinstance(module, ExpertFactors):
            fast.add(id(module.lora_B))
        for adapter in module.scaling if isinstance(module, LoraLayer) else ():
            assert isinstance(module, LoraLayer)
            lora_A, lora_B = module.factors(adapter)
            if isinstance(module, LoraEmbedding):
                embedding |= {id(lora_A), id(lora_B)}
            else:
                fast.add(id(lora_B))
            lengths |= {id(p) for name, p in module.adapter_state(adapter).items() if "magnitude" in name}
    return embedding, fast, lengths

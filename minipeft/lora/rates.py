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
        loraplus_weight_decay: Of matrices; vectors are not decayed.
        loraplus_lr_embedding: Of both factors on embeddings.

    Raises ValueError when no LoRA factor is trained, and for a ratio that is not positive.
    """
    if not loraplus_lr_ratio > 0:
        raise ValueError(f"loraplus_lr_ratio must be positive, got {loraplus_lr_ratio}")
    embedding, fast = _factors_of(model)
    if not any(id(p) in embedding | fast and p.requires_grad for p in model.parameters()):
        raise ValueError("loraplus_lr_ratio is for LoRA: the model trains no LoRA adapter")
    rates: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * loraplus_lr_ratio if id(parameter) in fast or parameter.ndim < 2 else lr
        if id(parameter) in embedding:
            rate = loraplus_lr_embedding
        decay = loraplus_weight_decay if parameter.ndim >= 2 else 0.0
        rates.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in rates.items()]


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: Any, *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Any:
    """PEFT's function: `optimizer_cls` over `lora_plus_groups`.

    Args:
        kwargs: loraplus_weight_decay and loraplus_lr_embedding go to the groups, the rest to the optimizer.
    """
    names = ("loraplus_weight_decay", "loraplus_lr_embedding")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    return optimizer_cls(lora_plus_groups(model, lr, loraplus_lr_ratio, **own), lr=lr, **kwargs)


def _factors_of(model: nn.Module) -> tuple[set[int], set[int]]:
    """The identities of the factors on embeddings, and of the factors B elsewhere."""
    embedding: set[int] = set()
    fast: set[int] = set()
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
    return embedding, fast

"""A tiny module of every class of experts that the installed transformers has."""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers.models
from torch import Tensor, nn

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, CHOSEN = 5, 64, 32, 7, 2

# Every field that a class of experts reads from its config; a new one makes `tiny_experts` fail, and is added here.
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTERMEDIATE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu"),
    **{
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.7,
        "post_norm_eps": 1e-6,
        "moe_latent_size": None,
        "mlp_gate_softcap": 1.5,
        "mlp_up_softcap": 1.5,
    },
    "_experts_implementation": "eager",
}


@cache
def experts_classes() -> dict[str, type[nn.Module]]:
    """ "family.Class" -> the class, of all that are computed through transformers' `use_experts_implementation`."""
    found = {}
    for source in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in text:
            continue
        module = importlib.import_module(f"transformers.models.{source.parent.name}.{source.stem}")
        for node in ast.parse(text).body:
            decorators = getattr(node, "decorator_list", ())
            if any("use_experts_implementation" in ast.unparse(decorator) for decorator in decorators):
                name = node.name  # type: ignore[attr-defined]
                found[f"{source.parent.name}.{name}"] = getattr(module, name)
    return found


def tiny_experts(cls: type[nn.Module], **fields: Any) -> Any:
    """A module of `cls` with random numbers in all its parameters."""
    more = {"intermediate_size": INTERMEDIATE} if "intermediate_size" in inspect.signature(cls).parameters else {}
    module = cls(SimpleNamespace(**{**_FIELDS, **fields}), **more)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module.eval()


def routed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of each (the last is chosen by none), and their weights."""
    torch.manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS - 1)[:CHOSEN] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, CHOSEN)

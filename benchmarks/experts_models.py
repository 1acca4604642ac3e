"""A mixture's experts with an adapter on them, by minipeft and by its peers: one layer's, of the sizes of known models.

A process that takes one side imports nothing of the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import RANK, Mixture

ALPHA = 32
TARGETS = ("gate_up_proj", "down_proj")
NF4, DENSE = "nf4", "dense"


class Holder(nn.Module):
    """The experts of a layer, called with the router's choice: an adapter is put on them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(T, hidden), the experts of each token (T, k) and their weights (T, k) -> (T, hidden)."""
        out: Tensor = self.experts(x, chosen, weights)
        return out


def base_of(
    mixture: Mixture, dtype: torch.dtype, device: torch.device, fill: Callable[[str, Tensor], object]
) -> Holder:
    """Qwen3's experts of the sizes of `mixture`, frozen; `fill` writes the weights of a name."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=mixture.hidden,
        num_experts=mixture.experts,
        num_experts_per_tok=mixture.chosen,
        moe_intermediate_size=mixture.intermediate,
    )
    config._experts_implementation = "grouped_mm"  # as for a model that transformers loads
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config).to(dtype)
    for name in TARGETS:
        parameter = nn.Parameter(torch.empty_like(experts.get_parameter(name), device=device), requires_grad=False)
        fill(name, parameter)
        setattr(experts, name, parameter)
    return Holder(experts)


def fill_randomly(name: str, weight: Tensor) -> None:
    """Weights as wide as a trained model's, the same for everybody."""
    weight.normal_(0, 0.02, generator=torch.Generator(weight.device).manual_seed(TARGETS.index(name)))


def adapted_by_minipeft(base: Holder, kind: str) -> nn.Module:
    """LoRA on both weights of the experts, which are packed first for the kind NF4."""
    from minipeft import LoraConfig, NF4Config, get_peft_model
    from minipeft.nf4 import quantize_model

    if kind == NF4:
        quantize_model(base, NF4Config())
    model: nn.Module = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_parameters=_paths()))
    return _with_factors(model)


def adapted_by_peft(base: Holder, kind: str) -> nn.Module:
    """The same by PEFT; for the kind NF4 its weights are packed by bitsandbytes' `replace_parameter_4bit`."""
    from peft import LoraConfig, get_peft_model

    if kind == NF4:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        for name in TARGETS:
            replace_parameter_4bit(base.experts, name, compress_statistics=True, quant_type="nf4", blocksize=64)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_parameters=_paths())
    model: nn.Module = get_peft_model(base, config)  # type: ignore[arg-type]
    if kind == NF4:
        for wrapper in model.modules():
            if hasattr(wrapper, "_activate_lora"):
                _mend(wrapper)
    return _with_factors(model)


def _mend(wrapper: Any) -> None:
    """Make PEFT 0.21.2 right over a weight that is decoded by a parametrization, at no cost in its time.

    It reads the second weight while torch's cache of parametrizations is on, then adds LoRA, and what is multiplied is
    the cached weight without it. And it does not take away what it added, so that each forward adds the update once
    more.
    """
    cache = torch.nn.utils.parametrize
    activate = wrapper._activate_lora

    @contextmanager
    def activate_whole(adapters: list[str]) -> Iterator[None]:
        base, name = wrapper.get_base_layer(), wrapper.parameter_name
        before = len(base.parametrizations[name])
        with warnings.catch_warnings():  # of what it does not take away
            warnings.simplefilter("ignore")
            with activate(adapters):
                steps, key = base.parametrizations[name], (id(base), name)
                if key in cache._cache:
                    cache._cache[key] = steps[-1](cache._cache[key])
                yield
        del steps[before:]

    wrapper._activate_lora = activate_whole


def _paths() -> list[str]:
    return [f"experts.{name}" for name in TARGETS]


def factors(model: nn.Module) -> list[nn.Parameter]:
    """A and B of both weights, in one order whoever made the model: both write them as in PEFT's files."""
    keys = {("lora_A" not in name, *p.shape): p for name, p in model.named_parameters() if p.requires_grad}
    if len(keys) != 2 * len(TARGETS):
        raise ValueError("the factors of the two weights are told apart by their shapes, and two have the same")
    return [keys[key] for key in sorted(keys)]


def _with_factors(model: nn.Module) -> nn.Module:
    """The adapter's numbers, the same for everybody."""
    for i, p in enumerate(factors(model)):
        generator = torch.Generator(p.device).manual_seed(10 + i)
        with torch.no_grad():
            p.normal_(0, 0.02, generator=generator)
    return model


class Batch:
    """Tokens, what a router chose for them, and the gradient of what comes out.

    Attributes:
        x: (T, hidden), whose gradient is wanted. chosen: int64 (T, k), different experts for each token.
        weights: float (T, k), a token's add up to 1. dy: (T, hidden).
    """

    def __init__(self, mixture: Mixture, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(tokens)
        x, dy = (torch.randn(tokens, mixture.hidden, generator=generator) for _ in range(2))
        logits = torch.randn(tokens, mixture.experts, generator=generator)
        best = logits.softmax(-1).topk(mixture.chosen)
        self.x = x.to(device, dtype).requires_grad_()
        self.dy, self.chosen = dy.to(device, dtype), best.indices.to(device)
        self.weights = (best.values / best.values.sum(-1, keepdim=True)).to(device, dtype)

    def step(self, model: nn.Module) -> list[Tensor]:
        """Forward and backward: y, and the gradients of x and of the factors."""
        wanted = [self.x, *factors(model)]
        y = model(self.x, self.chosen, self.weights)
        return [y.detach(), *torch.autograd.grad(y, wanted, self.dy)]

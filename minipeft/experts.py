"""A mixture's experts: each token's rows go through the experts that its router chose (Shazeer et al. 2017, section 2).

transformers keeps the experts of a layer in one module, with a 3-D parameter for each of their linear layers, and lets
others compute it: its classes say how their experts are made (`use_experts_implementation`), and `run_experts` computes
any of them by a function for the linear layers alone. What multiplies there is the caller's: LoRA, NF4, or both.

    tokens (T, H), k experts each   ->  T k rows, sorted by expert
    rows   ->  gate_up_proj (or up_proj)  ->  gate and activation  ->  down_proj  ->  times the router's weight
           ->  each token's k rows, added up                                                   (T, H)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minipeft.packed import PackedLayer


class Sorted(NamedTuple):
    """The rows of T tokens, k each, in the order of their experts.

    Attributes:
        offsets: int32 (experts,): expert e has the rows from offsets[e-1], or 0, up to offsets[e]. The rows after the
            last belong to experts on other devices.
        order: int64 (T k,): the place t k + j of each row, which is that of token t for its j-th expert.
        back: int64 (T k,): where the row of each place is; the inverse of `order`.
        k: experts a token.
    """

    offsets: Tensor
    order: Tensor
    back: Tensor
    k: int

    @property
    def tokens(self) -> Tensor:
        """int64 (T k,): the token that each row is of."""
        return self.order // self.k

    @property
    def token_count(self) -> int:
        """T."""
        return self.order.shape[0] // self.k


Product = Callable[[str, Tensor, Sorted], Tensor]
"""(name of a parameter, rows (S, in_features), their order) -> (S, out_features): each row by its expert's matrix."""

INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What an instance of a class with `use_experts_implementation` has, from transformers 5.6 on."""


def has_interface(module: nn.Module) -> bool:
    """True if `run_experts` can compute `module`: its class says how its experts are made."""
    return all(hasattr(module, name) for name in INTERFACE)


def linear_routers(model: nn.Module) -> list[str]:
    """The names of the linear layers of a mixture that choose its experts, or open the gate of a shared one.

    In transformers they are what is, or lies in, a `router`, and what is called `gate` or `shared_expert_gate`. A model
    without experts has none: there a `gate` is a part of an MLP.
    """
    if not any("Expert" in cls.__name__ for module in model.modules() for cls in type(module).__mro__):
        return []
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | PackedLayer)]
    return [name for name in linear if _chooses(name.split("."))]


def _chooses(parts: list[str]) -> bool:
    return any(part.endswith("router") for part in parts) or parts[-1] in ("gate", "shared_expert_gate")


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The names of the experts' linear layers in a module that `has_interface`, in the order of their use."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def packed(module: nn.Module, name: str) -> Any:
    """The weights `name` of `module` as they are packed, None for dense ones."""
    own: Any = getattr(module, "packed_experts", None)
    return None if own is None else own(name)


def is_stack(module: nn.Module, name: str) -> bool:
    """True if the parameter `name` of `module` is a matrix for each expert, packed or not."""
    parameter: Any = module._parameters[name]
    return parameter is not None and (parameter.dim() == 3 or packed(module, name) is not None)


def matrices(module: nn.Module, name: str) -> Any:
    """The experts' matrices (experts, out_features, in_features): dense, perhaps a view, or as they are packed."""
    stack = packed(module, name)
    if stack is not None:
        return stack
    weight: Any = module._parameters[name]
    return weight.transpose(1, 2) if module.is_transposed else weight


def run_experts(
    module: Any, product: Product, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The output of `module`, an experts' module of transformers', with `product` in the place of its linear layers.

    Args:
        module: `has_interface(module)`.
        hidden_states: (T, H).
        top_k_index: int64 (T, k), the experts of each token; `module.num_experts` and more are on other devices.
        top_k_weights: (T, k).

    Returns:
        (T, H) in the dtype of `hidden_states`.
    """
    experts, order = torch.sort(top_k_index.reshape(-1))
    offsets = torch.searchsorted(experts, torch.arange(module.num_experts, device=experts.device), right=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    rows = Sorted(offsets.int(), order, back, top_k_index.shape[1])
    # Rows of nobody multiply nothing, but a bias is looked up for them; their weights are zeros.
    owners = experts.clamp(max=module.num_experts - 1) if module.has_bias else None

    first, last = weight_names(module)
    out = product(first, _ToRows.apply(hidden_states, rows), rows)
    out = _add_bias(module, first, out, owners)
    out = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    out = _add_bias(module, last, product(last, out, rows), owners)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)

    weights = top_k_weights.reshape(-1)
    if getattr(module, "_is_expert_parallel", False):
        weights = weights.masked_fill(top_k_index.reshape(-1) >= module.num_experts, 0.0)
    out = _ToTokens.apply(out * weights[order].unsqueeze(-1), rows)
    return out.to(hidden_states.dtype)


class _ToRows(torch.autograd.Function):
    """(T, H) -> (T k, H): each token's row for each of its experts.

    Its gradient adds up a token's rows where they lie side by side: fast, and in the same order at each call, which
    `index_add_` on a GPU is not.
    """

    @staticmethod
    def forward(tokens: Tensor, rows: Sorted) -> Tensor:
        return tokens[rows.tokens]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sorted], output: Tensor) -> None:
        _, ctx.rows = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToTokens.apply(grad, ctx.rows), None


class _ToTokens(torch.autograd.Function):
    """(T k, H) -> (T, H): the sum of each token's rows; the transpose of `_ToRows`."""

    @staticmethod
    def forward(out: Tensor, rows: Sorted) -> Tensor:
        return out[rows.back].view(rows.token_count, rows.k, out.shape[-1]).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sorted], output: Tensor) -> None:
        _, ctx.rows = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ToRows.apply(grad, ctx.rows), None


def _add_bias(module: Any, name: str, out: Tensor, owners: Tensor | None) -> Tensor:
    """out + b_e: (S, out_features), with the bias of each row's expert, if the experts have biases."""
    if owners is None:
        return out
    return out + getattr(module, f"{name}_bias")[owners].to(out.dtype)

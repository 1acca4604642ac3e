"""Every class of experts in transformers by `run_experts`: transformers' own eager forward is the oracle."""

from typing import Any

import pytest
import torch
from tiny_experts import EXPERTS, experts_classes, routed, tiny_experts
from torch import Tensor

from minipeft.experts import Sorted, has_interface, matrices, run_experts, weight_names


def by_reference(module: Any) -> Any:
    """A product in the plainest PyTorch: each row by its own expert's matrix, the rows of nobody left at zero."""

    def product(name: str, rows: Tensor, order: Sorted) -> Tensor:
        ends, w = order.offsets.tolist(), matrices(module, name)
        parts = [rows[start:end] @ w[e].T for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
        return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], w.shape[1])])

    return product


@pytest.mark.parametrize("name", experts_classes())
def test_equals_the_eager_forward(name: str) -> None:
    module = tiny_experts(experts_classes()[name])
    assert has_interface(module) and all(matrices(module, n).shape[0] == EXPERTS for n in weight_names(module))
    results = []
    for call in (module, lambda *args: run_experts(module, by_reference(module), *args)):
        hidden, index, weights = routed()
        given = hidden.requires_grad_(), weights.requires_grad_()
        module.zero_grad()
        out = call(given[0], index, given[1])
        out.square().sum().backward()
        results.append([out, *(t.grad for t in given), *(p.grad for p in module.parameters())])
    for got, wanted in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
def test_experts_on_other_devices_add_nothing(name: str) -> None:
    module = tiny_experts(experts_classes()[name], _experts_implementation="grouped_mm")
    module._is_expert_parallel = True
    hidden, index, weights = routed()
    index[2, 1] = index[4, 0] = EXPERTS
    # transformers leaves their weights to the router, which makes them zeros.
    weights[2, 1] = weights[4, 0] = 0.0
    torch.testing.assert_close(
        run_experts(module, by_reference(module), hidden, index, weights), module(hidden, index, weights)
    )


def test_no_tokens_give_no_rows() -> None:
    module = tiny_experts(experts_classes()["mixtral.MixtralExperts"])
    hidden, index, weights = (t[:0] for t in routed())
    out = run_experts(module, by_reference(module), hidden.requires_grad_(), index, weights)
    assert out.shape == hidden.shape
    out.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_second_derivatives_and_vmap_free_gradients() -> None:
    module = tiny_experts(experts_classes()["mixtral.MixtralExperts"]).double()
    hidden, index, weights = routed()

    def run(hidden: Tensor, weights: Tensor) -> Tensor:
        return run_experts(module, by_reference(module), hidden, index, weights)

    inputs = hidden[:3].double().requires_grad_(), weights[:3].double().requires_grad_()
    index = index[:3]
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)
    functional = torch.func.grad(lambda h: run(h, inputs[1]).sum())(inputs[0])
    torch.testing.assert_close(functional, torch.autograd.grad(run(*inputs).sum(), inputs[0])[0])

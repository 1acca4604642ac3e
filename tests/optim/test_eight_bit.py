"""8-bit moments: how far they are from 32-bit ones, and that training does not notice."""

import pytest
import torch
from optim_cases import parameters, train

from minipeft import PagedAdamW

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}


def relative(ours, right):
    return ((ours - right).norm() / right.norm()).item()


@pytest.mark.parametrize(("steps", "first", "second", "parameter"), [(1, 0.012, 0.008, 1e-6), (100, 0.03, 0.02, 0.02)])
def test_moments_stay_near_those_of_32_bits(steps, first, second, parameter):
    """Relative to their norms. Measured: 1.1% and 0.7% by one rounding; 2.5%, 1.6% after 100 steps, and 1.7% of the way
    that parameters went."""
    small, exact = parameters(), parameters()
    ours = PagedAdamW(small, state_bits=8, **SETTINGS)
    theirs = torch.optim.AdamW(exact, fused=True, **SETTINGS)
    train(ours, small, steps, missing=0)
    train(theirs, exact, steps, missing=0)
    decoded = PagedAdamW(parameters())
    decoded.load_state_dict(ours.state_dict())
    for p, q, r, start in zip(decoded.param_groups[0]["params"], exact, small, parameters(), strict=True):
        if p.numel() > 100:
            assert relative(decoded.state[p]["exp_avg"], theirs.state[q]["exp_avg"]) < first
            assert relative(decoded.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"]) < second
            assert (r - q).norm() < parameter * (q - start).norm()


def test_state_takes_a_quarter_of_the_bytes():
    wide, small = (PagedAdamW(parameters(shapes=[(1000, 1000)]), state_bits=bits) for bits in (32, 8))
    assert small.memory_stats()["state_bytes"] < 0.26 * wide.memory_stats()["state_bytes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_to_the_same_loss(dtype):
    losses = {}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    y = torch.sin(x @ torch.randn(16, 8, generator=generator))
    for bits in (32, 8):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).to(dtype)
        optimizer = PagedAdamW(model.parameters(), lr=1e-2, state_bits=bits)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (model(x.to(dtype)).float() - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[bits] = loss.item()
    assert losses[32] < 0.1 and abs(losses[8] - losses[32]) < 0.1 * losses[32], losses

"""PagedAdamW computes what torch.optim.AdamW does, wherever its state lies."""

import pytest
import torch

from minipeft import PagedAdamW

SHAPES = [(300, 70), (5,), (1000,), (), (64, 64), (0,), (3, 5, 7)]
PAGE = 4096
BUDGETS = [
    {},
    {"page_bytes": PAGE},
    {"page_bytes": PAGE, "host_budget": 2 * PAGE},
    {"page_bytes": 2 * PAGE, "host_budget": 11 * PAGE},
    {"page_bytes": PAGE, "device_budget": 2 * PAGE},
    {"page_bytes": PAGE, "device_budget": 3 * PAGE, "host_budget": 2 * PAGE},
    {"page_bytes": PAGE, "device_budget": 20 * PAGE, "host_budget": 9 * PAGE},
    {"page_bytes": PAGE, "device_budget": 200 * PAGE, "host_budget": 2 * PAGE},
]


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(step, *copies, missing=0.3):
    """The same random gradients for each list of parameters; some are missing."""
    generator = torch.Generator().manual_seed(1000 + step)
    for same in zip(*copies, strict=True):
        present = torch.rand((), generator=generator) >= missing
        gradient = torch.randn(same[0].shape, generator=generator)
        for p in same:
            p.grad = gradient.to(p.dtype) if present else None


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(step, params)
        optimizer.step()


@pytest.fixture(scope="module")
def by_torch():
    params = parameters()
    train(torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1), params, 200)
    return params


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_200_steps_equal_torch(tmp_path, budgets, by_torch):
    params = parameters()
    train(PagedAdamW(params, lr=1e-2, weight_decay=0.1, spill_dir=tmp_path, **budgets), params, 200)
    for ours, theirs in zip(params, by_torch, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

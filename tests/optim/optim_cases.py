"""Parameters, gradients and budgets that the optimizer's tests share."""

import torch

PAGE = 4096
SHAPES = [(150, 70), (5,), (1000,), (), (64, 64), (0,), (3, 5, 7)]
# From two pages up past the whole state, which takes 33 pages of 4096 bytes.
BUDGETS = [
    {},
    {"page_bytes": PAGE},
    {"page_bytes": PAGE, "host_budget": 2 * PAGE},
    {"page_bytes": 2 * PAGE, "host_budget": 11 * PAGE},
    {"page_bytes": PAGE, "device_budget": 2 * PAGE},
    {"page_bytes": PAGE, "device_budget": 3 * PAGE, "host_budget": 2 * PAGE},
    {"page_bytes": PAGE, "device_budget": 2 * PAGE, "host_budget": 2 * PAGE},
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
        gradient = torch.randn(same[0].shape, generator=generator).to(same[0].dtype)
        for p in same:
            p.grad = gradient.to(p.dtype) if present else None


def train(optimizer, params, steps, first=0, missing=0.3):
    for step in range(first, first + steps):
        set_gradients(step, params, missing=missing)
        optimizer.step()


def distance(ours, theirs):
    """The largest difference of two lists of parameters, relative to the norms of the second."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)

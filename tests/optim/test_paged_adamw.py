"""PagedAdamW computes what torch.optim.AdamW does, wherever its state lies, and behaves as torch's optimizers do."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import BUDGETS, PAGE, assert_equal, distance, parameters, set_gradients, train

from minipeft import PagedAdamW
from minipeft.optim import PagingError

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
# Relative, after 200 steps; what torch's own two implementations differ by is 3e-8.
EQUAL = 1e-6


@pytest.fixture(scope="module")
def whole():
    """Parameters after 40 steps with all state in memory."""
    params = parameters()
    train(PagedAdamW(params, **SETTINGS), params, 40)
    return params


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("budgets", [{}, {"page_bytes": PAGE, "host_budget": 7 * PAGE}], ids=["memory", "paged"])
def test_200_steps_equal_torch(tmp_path, maximize, budgets):
    ours, theirs, fused = parameters(), parameters(), parameters()
    train(torch.optim.AdamW(theirs, maximize=maximize, **SETTINGS), theirs, 200)
    train(torch.optim.AdamW(fused, maximize=maximize, fused=True, **SETTINGS), fused, 200)
    train(PagedAdamW(ours, maximize=maximize, spill_dir=tmp_path, **budgets, **SETTINGS), ours, 200)
    assert distance(ours, theirs) < EQUAL
    assert_equal(ours, fused)


def test_float32_is_as_near_to_float64_as_torch():
    ours, theirs = parameters(), parameters()
    exact = [torch.nn.Parameter(p.detach().double()) for p in ours]
    optimizers = [PagedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)]
    optimizers.append(torch.optim.AdamW(exact, **SETTINGS))
    for step in range(100):
        set_gradients(step, ours, theirs, exact)
        for optimizer in optimizers:
            optimizer.step()
    assert distance(ours, exact) < 1.1 * distance(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_200_steps_of_16_bit_parameters_are_torchs_float32_steps_rounded_once(dtype):
    """torch keeps the moments of 16-bit parameters in 16 bits, and is farther from the truth for it."""
    ours = parameters(dtype)
    optimizer = PagedAdamW(ours, **SETTINGS)
    wide = [torch.nn.Parameter(p.detach().float()) for p in ours]
    reference = torch.optim.AdamW(wide, **SETTINGS)
    for step in range(200):
        set_gradients(step, ours, wide)
        for p, q in zip(ours, wide, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        reference.step()
        with torch.no_grad():
            for q in wide:
                q.copy_(q.to(dtype))
    # A float32 sum that lies on the boundary between two roundings may fall to either side.
    assert distance([p.float() for p in ours], wide) < 1e-4
    different = sum((p.float() != q).sum().item() for p, q in zip(ours, wide, strict=True))
    assert different < 1e-3 * sum(p.numel() for p in ours)


def test_bfloat16_parameters_are_nearer_to_float64_than_torchs():
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    exact = [torch.nn.Parameter(p.detach().double()) for p in ours]
    optimizers = [PagedAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)]
    optimizers.append(torch.optim.AdamW(exact, **SETTINGS))
    for step in range(100):
        set_gradients(step, ours, theirs)
        for p, q in zip(ours, exact, strict=True):
            q.grad = None if p.grad is None else p.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    assert distance(ours, exact) < 0.8 * distance(theirs, exact)


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_where_state_lies_does_not_change_a_bit(tmp_path, budgets, whole):
    params = parameters()
    optimizer = PagedAdamW(params, spill_dir=tmp_path, **budgets, **SETTINGS)
    train(optimizer, params, 40)
    assert_equal(params, whole)
    stats = optimizer.memory_stats()
    for name, tier in stats["tiers"].items():
        assert tier["bytes"] <= tier["peak_bytes"] <= tier["budget_bytes"] or name == "disk"
        assert tier["peak_bytes"] <= budgets.get(f"{name}_budget", 1 << 60)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8),
    device=st.none() | st.integers(2, 30),
    host=st.none() | st.integers(2, 30),
    bits=st.sampled_from([32, 8]),
    steps=st.integers(1, 5),
    fuse=st.booleans(),
)
def test_any_shapes_budgets_and_missing_gradients(tmp_path_factory, shapes, device, host, bits, steps, fuse):
    budgets = {name: n * PAGE for name, n in (("device_budget", device), ("host_budget", host)) if n}
    paged, plain = parameters(shapes=shapes), parameters(shapes=shapes)
    directory = tmp_path_factory.mktemp("spill")
    optimizer = PagedAdamW(
        paged, state_bits=bits, page_bytes=PAGE, spill_dir=directory, fuse_backward=fuse, **budgets, **SETTINGS
    )
    reference = PagedAdamW(plain, state_bits=bits, **SETTINGS)
    for step in range(steps):
        set_gradients(step, paged, plain)
        reference.step()
        if fuse:
            products = [(p * p.grad).sum() for p in paged if p.grad is not None]
            for p in paged:
                p.grad = None
            if products:
                torch.stack(products).sum().backward()
        optimizer.step()
        for name, tier in optimizer.memory_stats()["tiers"].items():
            assert tier["peak_bytes"] <= budgets.get(f"{name}_budget", 1 << 60)
    assert_equal(paged, plain)
    optimizer.close()


def test_parameters_that_are_not_contiguous_are_updated_in_place():
    ours, theirs = (torch.nn.Parameter(torch.arange(60.0).view(6, 10).t()) for _ in range(2))
    # Not its fused form: that takes a gradient of other strides for one of the same.
    ours_optimizer, theirs_optimizer = PagedAdamW([ours]), torch.optim.AdamW([theirs], fused=False)
    address = ours.data_ptr()
    for step in range(3):
        set_gradients(step, [ours], [theirs], missing=0)
        ours_optimizer.step()
        theirs_optimizer.step()
    assert not ours.is_contiguous() and ours.data_ptr() == address
    assert distance([ours], [theirs]) < EQUAL


def test_frozen_parameters_take_no_room_until_they_have_a_gradient():
    frozen, free = parameters(shapes=[(1000, 100), (10, 10)])
    frozen.requires_grad_(False)
    optimizer = PagedAdamW([frozen, free])
    assert optimizer.memory_stats()["state_bytes"] < 2000
    frozen.requires_grad_(True)
    train(optimizer, [frozen, free], 1, missing=0)
    assert optimizer.memory_stats()["state_bytes"] > 800_000


def test_parameter_groups_and_schedule_as_torch(tmp_path):
    ours, theirs = parameters(), parameters()
    pairs = []
    for make, params in (
        (lambda g: PagedAdamW(g, page_bytes=PAGE, host_budget=2 * PAGE, spill_dir=tmp_path), ours),
        (lambda g: torch.optim.AdamW(g, fused=True), theirs),
    ):
        groups = [{"params": params[:2], "lr": 1e-2}, {"params": params[2:5], "betas": (0.5, 0.9), "weight_decay": 0}]
        optimizer = make(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        pairs.append((optimizer, schedule, params))
    for optimizer, schedule, params in pairs:
        train(optimizer, params[:5], 3)
        optimizer.add_param_group({"params": params[5:], "lr": 0.1})
        for step in range(3, 12):
            set_gradients(step, params)
            optimizer.step()
            schedule.step() if step < 6 else None
    assert distance(ours, theirs) < EQUAL
    assert pairs[0][0].param_groups[0]["lr"] == pairs[1][0].param_groups[0]["lr"] < 1e-2


def test_closure_gives_its_loss():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = PagedAdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert optimizer.step(closure).item() < 3.0


def test_grad_scaler_skips_steps_with_infinite_gradients_and_unscales_the_rest():
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    for p, make in ((ours, PagedAdamW), (theirs, torch.optim.AdamW)):
        optimizer, scaler = make([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[p]["step"] == 2 and scaler.get_scale() == 512.0
    assert distance([ours], [theirs]) < EQUAL


def test_hooks_around_a_step_are_called():
    params, calls = parameters(), []
    optimizer = PagedAdamW(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, 1)
    assert calls == ["before", "after"]


def test_autograd_learns_that_parameters_changed():
    p = torch.nn.Parameter(torch.ones(3))
    product = p * p
    p.grad = torch.ones(3)
    PagedAdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_sparse_gradients_are_refused_by_name():
    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = PagedAdamW(table.named_parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients, such as that of parameter 'weight'"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amsgrad": True}, "does not support amsgrad=True"),
        ({"capturable": True}, "does not support capturable=True"),
        ({"differentiable": True}, "does not support differentiable=True"),
        ({"lr": -1.0}, "lr must be 0 or greater, got -1.0"),
        ({"eps": -1.0}, "eps must be"),
        ({"weight_decay": float("nan")}, "weight_decay must be"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"state_bits": 4}, "state_bits must be one of 32, 8, got 4"),
        ({"page_bytes": 5000}, r"page_bytes \(5000\) must be a multiple of 4096"),
        ({"page_bytes": 8192, "host_budget": 9000}, r"host_budget \(9000\) must hold 2 pages of page_bytes \(8192\)"),
        ({"device_budget": 0}, r"device_budget \(0\) must hold"),
        ({"page_bytes": PAGE, "host_budget": 2 * PAGE}, "takes 31 pages of 4,096 bytes.* give spill_dir"),
        ({"page_bytes": PAGE, "device_budget": 2 * PAGE, "host_budget": 9 * PAGE}, "give spill_dir"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(parameters(), **arguments)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 \(2,\) is torch.float64"):
        PagedAdamW([torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))])


def test_parameters_elsewhere_are_refused():
    here, nowhere = (torch.nn.Parameter(torch.ones(1, device=device)) for device in ("cpu", "meta"))
    with pytest.raises(ValueError, match="on one device, these are on cpu, meta"):
        PagedAdamW([here, nowhere])
    with pytest.raises(ValueError, match="on cpu and cuda, these are on meta"):
        PagedAdamW([nowhere])


def test_foreach_and_fused_are_accepted():
    for flags in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        params = parameters()
        train(PagedAdamW(params, **flags), params, 1)


def test_a_closed_optimizer_says_so(tmp_path):
    params = parameters()
    optimizer = PagedAdamW(params, page_bytes=PAGE, host_budget=2 * PAGE, spill_dir=tmp_path)
    train(optimizer, params, 1)
    optimizer.close()
    optimizer.close()
    set_gradients(1, params)
    with pytest.raises(PagingError, match="closed"):
        optimizer.step()
    with pytest.raises(PagingError, match="closed"):
        optimizer.state_dict()


@pytest.mark.parametrize("fuse", [False, True])
def test_an_optimizer_that_is_dropped_frees_its_state(tmp_path, fuse):
    params = parameters()
    optimizer = PagedAdamW(params, page_bytes=PAGE, host_budget=2 * PAGE, spill_dir=tmp_path, fuse_backward=fuse)
    train(optimizer, params, 2)
    pager = weakref.ref(optimizer.pages.pager)
    threads = pager()._threads
    assert all(thread.is_alive() for thread in threads)
    del optimizer
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)


def test_a_step_that_fails_half_way_is_not_gone_on_from(monkeypatch):
    params = parameters()
    optimizer = PagedAdamW(params)
    train(optimizer, params, 1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "_update", interrupted)
    set_gradients(1, params)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for act in (optimizer.step, optimizer.state_dict):
        with pytest.raises(PagingError, match=r"half taken \(KeyboardInterrupt\(\)\).*checkpoint"):
            act()

"""Updates within backward: the same numbers, gradients that never all exist, the fewest moves."""

import copy

import pytest
import torch
from optim_cases import PAGE, assert_equal

from minipeft import PagedAdamW
from minipeft.optim import PagingError
from minipeft.optim.tiers import SimulatedDevice

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def network(layers=6, width=40):
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])


def loss_of(model, step, width=40):
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(step))
    return (model(x) - x).square().mean()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("paged", [False, True])
def test_numbers_are_those_of_a_step_after_backward(tmp_path, bits, paged):
    fused_model, plain_model = network(), network()
    memory = {"page_bytes": PAGE, "host_budget": 4 * PAGE, "spill_dir": tmp_path} if paged else {}
    fused = PagedAdamW(fused_model.parameters(), fuse_backward=True, state_bits=bits, **memory, **SETTINGS)
    plain = PagedAdamW(plain_model.parameters(), state_bits=bits, **SETTINGS)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (fused, plain)]
    for step in range(10):
        for model, optimizer, schedule in zip((fused_model, plain_model), (fused, plain), schedules, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert_equal(fused_model.parameters(), plain_model.parameters())
    assert fused.state[fused_model[0].weight]["step"] == 10


def test_gradients_never_all_exist():
    model = network(layers=12)
    optimizer = PagedAdamW(model.parameters(), fuse_backward=True)
    alive = []
    for layer in model[1:]:
        layer.register_full_backward_hook(lambda *_: alive.append(sum(p.grad is not None for p in model.parameters())))
    loss_of(model, 0).backward()
    assert len(alive) == 11
    assert max(alive) <= 2 and all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_gradient_checkpointing_and_shared_weights_work():
    """A weight that is used twice is updated once, when both uses are accounted for."""
    models = [network(layers=3), network(layers=3)]
    for number, model in enumerate(models):
        model.append(model[0])
        optimizer = PagedAdamW(model.parameters(), fuse_backward=number == 0, **SETTINGS)
        for step in range(3):
            x = torch.randn(8, 40, generator=torch.Generator().manual_seed(step))
            out = torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(models[0].parameters(), models[1].parameters())


def test_second_backward_without_a_step_is_refused():
    model = network()
    optimizer = PagedAdamW(model.parameters(), fuse_backward=True)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="every backward is a step, so gradients cannot be accumulated"):
        loss_of(model, 1).backward()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()


def test_grad_scaler_is_refused_by_torch():
    model = network()
    optimizer = PagedAdamW(model.parameters(), fuse_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_steady_sweeps_move_little_more_than_must(tmp_path):
    model = network(layers=12)
    optimizer = PagedAdamW(
        model.parameters(), fuse_backward=True, page_bytes=PAGE, host_budget=12 * PAGE, spill_dir=tmp_path
    )
    for step in range(8):
        if step == 3:
            before = optimizer.memory_stats()
        loss_of(model, step).backward()
        optimizer.step()
    stats = optimizer.memory_stats()
    least = stats["pages"] - 12
    # Three pages are on their way at a time; least-recently-used would bring all of them, every time.
    assert (stats["page_ins"] - before["page_ins"]) / 5 <= least + 5 < stats["pages"]


def test_failed_copy_comes_out_of_backward():
    def fail(direction, page):
        raise OSError("the link is down")

    model = network()
    optimizer = PagedAdamW(
        model.parameters(),
        fuse_backward=True,
        page_bytes=PAGE,
        device_budget=4 * PAGE,
        simulate=lambda *args: SimulatedDevice(*args, on_copy=fail),
    )
    with pytest.raises(PagingError, match="the link is down"):
        loss_of(model, 0).backward()
    with pytest.raises(PagingError, match="checkpoint"):
        optimizer.state_dict()


def test_a_model_outlives_its_optimizer():
    model = network()
    optimizer = PagedAdamW(model.parameters(), fuse_backward=True)
    loss_of(model, 0).backward()
    optimizer.step()
    del optimizer
    loss_of(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert copy.deepcopy(model) is not model

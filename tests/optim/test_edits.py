"""Groups and state that the user's code edits between steps act as they do in torch.optim.AdamW."""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_cases import PAGE, assert_equal, parameters, set_gradients, train

from minipeft import PagedAdamW

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
SHAPES = [(60, 70), (5,), (64, 64), (), (0,), (3, 5, 7)]
MEMORY = [
    {},
    {"page_bytes": PAGE},
    {"page_bytes": PAGE, "host_budget": 2 * PAGE},
    {"page_bytes": PAGE, "device_budget": 3 * PAGE, "host_budget": 4 * PAGE},
]


class Run:
    """One optimizer, its parameters, and what the user's code holds of its state."""

    def __init__(self, make):
        self.params = parameters(shapes=SHAPES)
        self.optimizer = make([{"params": self.params[:2]}, {"params": self.params[2:], "lr": 3e-2}])
        self.held = []

    def param(self, number):
        return self.params[number % len(self.params)]

    def group(self, number):
        return self.optimizer.param_groups[number % len(self.optimizer.param_groups)]

    def entry(self, number):
        """A state that is there, or none."""
        return self.optimizer.state.get(self.param(number)) or None

    def take_out(self, p):
        for group in self.optimizer.param_groups:
            group["params"] = [q for q in group["params"] if q is not p]


def move(run, a, b):
    p = run.param(a)
    run.take_out(p)
    run.group(b)["params"].append(p)


def remove(run, a, b):
    run.take_out(run.param(a))


def delete_group(run, a, b):
    if len(run.optimizer.param_groups) > 1:
        del run.optimizer.param_groups[a % len(run.optimizer.param_groups)]


def add_group(run, a, b):
    run.take_out(run.param(a))
    run.optimizer.add_param_group({"params": [run.param(a)], "lr": 0.01 * (b + 1)})


def append_group(run, a, b):
    run.take_out(run.param(a))
    run.optimizer.param_groups.append({**run.group(b), "params": [run.param(a)], "betas": (0.5, 0.9)})


def set_rate(run, a, b):
    run.group(a)["lr"] = 0.01 * b
    run.group(b)["weight_decay"] = 0.1 * a


def replace_groups(run, a, b):
    run.optimizer.param_groups = [dict(group, params=list(group["params"])) for group in run.optimizer.param_groups]


def replace_parameter(run, a, b):
    """What pruning and growing of layers do: another tensor, of another length, takes over the cut moments."""
    old = run.param(a)
    if old.dim() == 0:
        return
    new = torch.nn.Parameter(old.detach()[: 1 + b].clone())
    state = run.entry(a)
    for group in run.optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if state is not None:
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name][: 1 + b].clone()
        del run.optimizer.state[old]
        run.optimizer.state[new] = state
    run.params[a % len(run.params)] = new


def clear(run, a, b):
    run.optimizer.state.clear()


def new_state(run, a, b):
    run.optimizer.state = defaultdict(dict)


def reset_by_setstate(run, a, b):
    run.optimizer.__setstate__({"state": defaultdict(dict)})


def delete_entry(run, a, b):
    run.optimizer.state.pop(run.param(a), None)


def empty_entry(run, a, b):
    run.optimizer.state[run.param(a)] = {}


def empty_in_place(run, a, b):
    if (state := run.entry(a)) is not None:
        state.clear() if b % 2 else [state.pop(key) for key in list(state)]


def scale_in_place(run, a, b):
    if (state := run.entry(a)) is not None:
        state[("exp_avg", "exp_avg_sq")[b % 2]].mul_(0.5 * (b % 3))


def prune_all(run, a, b):
    """ReLoRA's reset."""
    for state in run.optimizer.state.values():
        for key, value in state.items():
            if key != "step":
                value.view(-1)[:: 2 + a].zero_()


def put_tensor(run, a, b):
    if (state := run.entry(a)) is not None:
        value = torch.full_like(run.param(a).detach(), 0.1 * (b + 1))
        state["exp_avg_sq"] = value
        run.held.append(value)


def put_step(run, a, b):
    if (state := run.entry(a)) is not None:
        if a % 2:
            state["step"] = torch.tensor(float(b))
        else:
            state["step"].fill_(b)


def put_state(run, a, b):
    zeros = torch.zeros_like(run.param(a).detach())
    run.optimizer.state[run.param(a)] = {"step": torch.tensor(b + 1.0), "exp_avg": zeros, "exp_avg_sq": zeros + 0.1}


def hold(run, a, b):
    if (state := run.entry(a)) is not None:
        run.held.append(state[("exp_avg", "exp_avg_sq")[b % 2]])


def edit_held(run, a, b):
    if run.held:
        run.held[a % len(run.held)].mul_(0.5)


def forget_held(run, a, b):
    run.held.clear()


def put_back(run, a, b):
    """A state that was taken away acts again."""
    if (state := run.optimizer.state.pop(run.param(a), None)) is not None:
        run.optimizer.state[run.param(a)] = state


def deep_copy(run, a, b):
    run.params, run.optimizer, run.held = copy.deepcopy((run.params, run.optimizer, []))


def pickled(run, a, b):
    run.params, run.optimizer, run.held = pickle.loads(pickle.dumps((run.params, run.optimizer, [])))


def load_own_state(run, a, b):
    # torch's state dict holds the moments themselves, ours copies.
    run.held.clear()
    known = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    if all(id(p) in known for p in run.optimizer.state):
        run.optimizer.load_state_dict(run.optimizer.state_dict())


EDITS = [
    *(move, remove, delete_group, add_group, append_group, set_rate, replace_groups, replace_parameter, clear),
    *(new_state, reset_by_setstate, delete_entry, empty_entry, empty_in_place, scale_in_place, prune_all, put_tensor),
    *(put_step, put_state, hold, edit_held, forget_held, put_back, deep_copy, pickled, load_own_state),
]
EDIT = st.tuples(st.sampled_from(EDITS), st.integers(0, 5), st.integers(0, 3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(memory=st.sampled_from(MEMORY), rounds=st.lists(st.lists(EDIT, max_size=3), min_size=2, max_size=8))
def test_any_edits_between_steps_act_as_in_torch(tmp_path_factory, memory, rounds):
    directory = tmp_path_factory.mktemp("spill")
    ours = Run(lambda groups: PagedAdamW(groups, spill_dir=directory, **memory, **SETTINGS))
    theirs = Run(lambda groups: torch.optim.AdamW(groups, fused=True, **SETTINGS))
    for step, edits in enumerate(rounds):
        set_gradients(step, ours.params, theirs.params)
        for run in (ours, theirs):
            run.optimizer.step()
            for edit, a, b in edits:
                edit(run, a, b)
    for run in (ours, theirs):
        set_gradients(99, run.params, missing=0)
        run.optimizer.step()
    assert_equal(ours.params, theirs.params)
    assert_equal(ours.held, theirs.held)
    for p, q in zip(ours.params, theirs.params, strict=True):
        state = ours.optimizer.state.get(p, {})
        assert state.keys() == theirs.optimizer.state.get(q, {}).keys()
        for key, value in theirs.optimizer.state.get(q, {}).items():
            assert torch.equal(state[key], value), key


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    memory=st.sampled_from(MEMORY),
    bits=st.sampled_from([32, 8]),
    rounds=st.lists(st.lists(st.tuples(st.sampled_from([
        *(move, remove, delete_group, add_group, append_group, set_rate, clear, new_state, delete_entry, empty_entry),
        *(deep_copy, pickled, load_own_state),
    ]), st.integers(0, 5), st.integers(0, 3)), max_size=2), min_size=2, max_size=6),
)  # fmt: skip
def test_any_edits_act_on_updates_within_backward_as_on_those_after_it(tmp_path_factory, memory, bits, rounds):
    directory = tmp_path_factory.mktemp("spill")
    settings = {**SETTINGS, "state_bits": bits}
    fused = Run(lambda groups: PagedAdamW(groups, spill_dir=directory, fuse_backward=True, **memory, **settings))
    plain = Run(lambda groups: PagedAdamW(groups, **settings))
    for step, edits in enumerate(rounds):
        for run in (fused, plain):
            slopes = torch.Generator().manual_seed(step)
            for p in run.params:
                p.grad = None
            torch.stack([(p * torch.randn(p.shape, generator=slopes)).sum() for p in run.params]).sum().backward()
            run.optimizer.step()
            for edit, a, b in edits:
                edit(run, a, b)
    assert_equal(fused.params, plain.params)
    grouped = {id(p) for group in fused.optimizer.param_groups for p in group["params"]}
    fused.optimizer.zero_grad()
    assert all(p.grad is None for p in fused.params if id(p) in grouped)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("copying", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), "torch.save"])
def test_a_copy_goes_on_alone_in_pages_of_its_own(tmp_path, bits, copying):
    params = parameters()
    memory = {"page_bytes": PAGE, "host_budget": 3 * PAGE, "spill_dir": tmp_path}
    optimizer = PagedAdamW(params, state_bits=bits, **memory, **SETTINGS)
    train(optimizer, params, 4)
    if copying == "torch.save":
        file = io.BytesIO()
        torch.save((params, optimizer), file)
        file.seek(0)
        twins, twin = torch.load(file, weights_only=False)
    else:
        twins, twin = copying((params, optimizer))
    assert twin.pages is not optimizer.pages
    assert twin.memory_stats()["tiers"]["host"]["budget_bytes"] == 3 * PAGE
    before = [p.detach().clone() for p in params]
    train(twin, twins, 3, first=4)
    assert_equal(params, before)
    train(optimizer, params, 3, first=4)
    assert_equal(params, twins)
    optimizer.close()
    train(twin, twins, 1, first=9)
    assert all(group.keys() == optimizer.param_groups[0].keys() for group in twin.param_groups)


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(PagedAdamW(parameters()))


def test_a_copy_of_a_parameters_state_is_a_plain_dict_of_its_own():
    params = parameters()
    optimizer = PagedAdamW(params)
    train(optimizer, params, 2, missing=0)
    state = optimizer.state[params[0]]
    kept = copy.deepcopy(state)
    assert type(kept) is dict and list(kept) == ["step", "exp_avg", "exp_avg_sq"]
    kept["exp_avg"].zero_()
    assert state["exp_avg"].any()
    optimizer.state[params[0]] = kept
    set_gradients(0, params, missing=0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], 0.1 * params[0].grad)


def test_resets_and_new_parameters_take_no_further_pages():
    """Also where the budget holds the state just so, and there is no disk."""
    params = parameters()
    optimizer = PagedAdamW(params, page_bytes=PAGE, host_budget=33 * PAGE)
    pages = optimizer.memory_stats()["pages"]
    for step in range(6):
        train(optimizer, params, 1, first=step, missing=0)
        if step % 2:
            optimizer.state.clear()
        else:
            params = [torch.nn.Parameter(p.detach().clone()) for p in params]
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = list(params)
    assert optimizer.memory_stats()["pages"] == pages


def test_a_state_that_nobody_holds_costs_nothing_more(tmp_path):
    """Reading it makes one step write it back; from the next on the moves are what they were."""
    moved = {}
    for look in (False, True):
        params = parameters()
        optimizer = PagedAdamW(params, page_bytes=PAGE, host_budget=3 * PAGE, spill_dir=tmp_path)
        train(optimizer, params, 3, missing=0)
        if look:
            sum(float(state["exp_avg"].sum()) for state in optimizer.state.values())
        train(optimizer, params, 2, first=3, missing=0)
        before = optimizer.memory_stats()["bytes_moved"]
        train(optimizer, params, 4, first=5, missing=0)
        moved[look] = optimizer.memory_stats()["bytes_moved"] - before
        assert all(state.settled_for is p for p, state in optimizer.state.items())
    assert moved[True] == moved[False]


def shrink(optimizer, p):
    p.data = torch.ones(3)
    p.grad = torch.ones(3)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda o, p: o.state[p].pop("exp_avg"),
            ValueError,
            r"state of parameter 'b' \(5,\) must have the entries step",
        ),
        (lambda o, p: o.state[p].update(exp_avg=torch.ones(4)), ValueError, r"'b' \(5,\) must be torch.float32 \(5,\)"),
        (lambda o, p: o.state[p].update(exp_avg=0.0), ValueError, "exp_avg in the state of .*'b'.*is a float"),
        (lambda o, p: o.state[p].update(step=0.5), ValueError, "'b' .*has step 0.5"),
        (lambda o, p: o.state.update({p: {"exp_avg": torch.ones(5)}}), ValueError, "and has exp_avg"),
        (lambda o, p: o.state.update({p: 3}), TypeError, "state of .*'b'.* must be a dict, and is 3"),
        (
            lambda o, p: o.state.update({p: o.state[o.param_groups[0]["params"][2]]}),
            ValueError,
            r"'b' \(5,\) and parameter 'c' \(1000,\) have one state",
        ),
        (lambda o, p: o.param_groups.append({**o.param_groups[0], "params": [p]}), ValueError, "in the .*groups twice"),
        (lambda o, p: o.param_groups[0]["params"].append(p), ValueError, "in the parameter groups twice"),
        (lambda o, p: o.param_groups[0].update(amsgrad=True), ValueError, "does not support amsgrad=True"),
        (lambda o, p: o.param_groups[0].update(decoupled_weight_decay=False), ValueError, "torch.optim.Adam"),
        (shrink, ValueError, r"in the state of parameter 'b' \(3,\) must be torch.float32 \(3,\), and is .* \(5,\)"),
    ],
)
def test_edits_that_cannot_be_honoured_are_named_at_the_next_step_which_changes_nothing(edit, error, message):
    params = parameters()
    optimizer = PagedAdamW(list(zip("abcdefg", params, strict=True)))
    train(optimizer, params, 3, missing=0)
    set_gradients(3, params, missing=0)
    edit(optimizer, params[1])
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_equal(params, before)
    # Nothing is broken: mended, it goes on.
    optimizer.param_groups[1:] = []
    optimizer.param_groups[0].update(params=params, amsgrad=False, decoupled_weight_decay=True)
    optimizer.state[params[1]] = {}
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True) if p.numel())


def test_a_parameter_that_is_appended_to_a_group_of_named_ones_is_trained():
    params = parameters()
    optimizer = PagedAdamW(list(zip("abcdef", params[:-1], strict=True)))
    optimizer.param_groups[0]["params"].append(params[-1])
    train(optimizer, params, 1, missing=0)
    assert optimizer.state[params[-1]]["step"] == 1


def test_entries_that_torch_would_carry_along_are_refused_at_once():
    params = parameters()
    optimizer = PagedAdamW(params)
    train(optimizer, params, 1, missing=0)
    with pytest.raises(KeyError, match="'mine' would not be kept"):
        optimizer.state[params[0]]["mine"] = 1


def test_state_of_a_parameter_in_no_group_is_not_saved_in_silence(tmp_path):
    params = parameters()
    optimizer = PagedAdamW(params)
    train(optimizer, params, 1, missing=0)
    optimizer.param_groups[0]["params"] = params[1:]
    for save in (optimizer.state_dict, lambda: optimizer.save_state(tmp_path / "state.safetensors")):
        with pytest.raises(ValueError, match=r"state of a parameter \(150, 70\) that is in no group: delete it"):
            save()
    del optimizer.state[params[0]]
    assert len(optimizer.state_dict()["state"]) == len(params) - 1


def test_edited_state_is_saved_as_it_was_edited(tmp_path):
    params = parameters()
    optimizer = PagedAdamW(params)
    train(optimizer, params, 2, missing=0)
    held = optimizer.state[params[0]]["exp_avg"].fill_(3.0)
    optimizer.state[params[1]]["step"] = 7
    assert (optimizer.state_dict()["state"][0]["exp_avg"] == 3).all()
    optimizer.save_state(tmp_path / "state.safetensors")
    other = PagedAdamW(params)
    other.load_state(tmp_path / "state.safetensors")
    assert (other.state[params[0]]["exp_avg"] == 3).all() and other.state[params[1]]["step"] == 7
    held.fill_(4.0)
    assert (optimizer.state_dict()["state"][0]["exp_avg"] == 4).all()

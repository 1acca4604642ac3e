"""State goes to torch.optim.AdamW and back, to files and back, bit for bit, and what does not fit is named."""

import io

import pytest
import torch
from optim_cases import PAGE, SHAPES, assert_equal, distance, parameters, set_gradients, train
from safetensors.torch import load_file, save_file

from minipeft import PagedAdamW
from minipeft.optim import PagingError, state_dicts

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def paged(params, directory, pages=3, **settings):
    memory = {"page_bytes": PAGE, "host_budget": pages * PAGE, "spill_dir": directory}
    return PagedAdamW(params, **{**memory, **SETTINGS, **settings})


def trained(directory, steps=5, **settings):
    params = parameters()
    optimizer = paged(params, directory, **settings)
    train(optimizer, params, steps)
    return params, optimizer


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_same_state(ours, theirs):
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        assert state.keys() == theirs["state"][index].keys()
        for name, value in state.items():
            assert value.dtype == theirs["state"][index][name].dtype
            assert torch.equal(value, theirs["state"][index][name]), (index, name)


def test_torch_goes_on_from_our_state(tmp_path):
    ours, optimizer = trained(tmp_path)
    theirs = copies(ours)
    continued = torch.optim.AdamW(theirs, fused=True)
    continued.load_state_dict(optimizer.state_dict())
    for group in continued.param_groups:
        group["fused"] = True
    train(optimizer, ours, 5, first=5)
    train(continued, theirs, 5, first=5)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("fused", [True, False])
def test_our_optimizer_goes_on_from_torchs_state(tmp_path, fused):
    theirs = parameters()
    reference = torch.optim.AdamW(theirs, fused=fused, **SETTINGS)
    train(reference, theirs, 5)
    ours = copies(theirs)
    optimizer = paged(ours, tmp_path, lr=1.0)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    for step in range(5, 10):
        set_gradients(step, ours, theirs)
        optimizer.step()
        reference.step()
    assert distance(ours, theirs) < 1e-6
    if fused:
        assert_equal(ours, theirs)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("by_file", [False, True], ids=["dict", "file"])
def test_resume_is_bit_exact_under_other_budgets(tmp_path, bits, by_file):
    ours, optimizer = trained(tmp_path, state_bits=bits)
    again = copies(ours)
    resumed = paged(again, tmp_path, state_bits=bits, pages=7, page_bytes=2 * PAGE, host_budget=14 * PAGE, lr=7.0)
    if by_file:
        optimizer.save_state(tmp_path / "state.safetensors")
        resumed.load_state(tmp_path / "state.safetensors")
    else:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert_same_state(resumed.state_dict(), optimizer.state_dict())
    train(optimizer, ours, 4, first=5)
    train(resumed, again, 4, first=5)
    assert_equal(ours, again)


def test_loading_keeps_paging_and_replaces_what_was_there(tmp_path):
    ours, optimizer = trained(tmp_path)
    before = optimizer.memory_stats()
    state = optimizer.state_dict()
    train(optimizer, ours, 2, first=20)
    optimizer.load_state_dict(state)
    stats = optimizer.memory_stats()
    assert stats["pages"] == before["pages"]
    assert stats["tiers"]["host"]["peak_bytes"] <= 3 * PAGE and stats["tiers"]["disk"]["bytes"] <= before["state_bytes"]
    assert_same_state(optimizer.state_dict(), state)


def test_an_empty_state_takes_all_state_away(tmp_path):
    ours, optimizer = trained(tmp_path)
    fresh = copies(ours)
    optimizer.load_state_dict(paged(fresh, tmp_path).state_dict())
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, ours, 3)
    train(paged(fresh, tmp_path), fresh, 3)
    reference = copies(ours)
    assert distance(ours, fresh) < 1e-6 and len(reference) == len(ours)


def test_an_empty_state_loaded_at_the_start_touches_no_memory():
    """accelerate does so whenever it prepares an optimizer."""
    optimizer = PagedAdamW(parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.memory_stats()["tiers"]["host"]["peak_bytes"] == 0


def test_learning_rate_that_is_a_tensor_is_saved(tmp_path):
    params = parameters()
    optimizer = PagedAdamW(params, lr=torch.tensor(0.5))
    train(optimizer, params, 1)
    optimizer.save_state(tmp_path / "state.safetensors")
    optimizer.load_state(tmp_path / "state.safetensors")
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_state_of_a_parameter_is_read_when_it_is_asked_for(tmp_path):
    ours, optimizer = trained(tmp_path)
    whole = optimizer.state_dict()["state"]
    assert set(optimizer.state) == {ours[index] for index in whole}
    for index, state in whole.items():
        lazy = optimizer.state[ours[index]]
        assert list(lazy) == ["step", "exp_avg", "exp_avg_sq"] and len(lazy) == 3
        assert all(torch.equal(lazy[name], value) for name, value in state.items())


def test_8_bits_from_32_and_back(tmp_path):
    ours, optimizer = trained(tmp_path)
    exact = optimizer.state_dict()
    small = paged(copies(ours), tmp_path, state_bits=8)
    small.load_state_dict(exact)
    wide = paged(copies(ours), tmp_path)
    wide.load_state_dict(small.state_dict())
    for index, state in wide.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            right = exact["state"][index][name]
            if right.numel():
                assert (state[name] - right).norm() < 0.02 * right.norm(), (index, name)
        assert state["step"] == exact["state"][index]["step"]


def broken(state_dict, change):
    state_dict = {
        "state": {index: dict(state) for index, state in state_dict["state"].items()},
        "param_groups": [dict(group) for group in state_dict["param_groups"]],
    }
    change(state_dict)
    return state_dict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][2].update(exp_avg=torch.zeros(999)), r"exp_avg in the state of parameter 'c' \(1000,\)"),
        (
            lambda s: s["state"][4].pop("exp_avg_sq"),
            r"state of parameter 'e' \(64, 64\) must have.* and has exp_avg, step",
        ),
        (lambda s: s["state"][2].update(max_exp_avg_sq=torch.zeros(1000)), "'c'.*amsgrad is not supported"),
        (lambda s: s["state"][2].update(step=torch.tensor(1.5)), "'c' .*has step 1.5"),
        (lambda s: s["state"][2].update(exp_avg=1.0), r"'c' .* must be torch.float32 \(1000,\), and is a float"),
        (lambda s: s["state"][2].update(exp_avg=torch.zeros(1000).byte()), "'c' .*and is torch.uint8"),
        (lambda s: s["state"].update({17: {"step": 1}}), r"in none of its groups: \[17\]"),
        (lambda s: s["param_groups"][0].update(params=[0, 1]), r"groups of \[2\] parameters, the optimizer has \[7\]"),
        (lambda s: s["param_groups"].append({"params": []}), r"groups of \[7, 0\] parameters"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "does not support amsgrad=True"),
        (lambda s: s["param_groups"][0].update(decoupled_weight_decay=False), "torch.optim.Adam"),
        (lambda s: s.pop("param_groups"), "not the state dict of an optimizer: no 'param_groups'"),
    ],
)
def test_state_that_does_not_fit_is_named_and_changes_nothing(tmp_path, change, message):
    names = "abcdefg"
    params = parameters()
    optimizer = paged(list(zip(names, params, strict=True)), tmp_path)
    train(optimizer, params, 5, missing=0)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(before, change))
    assert_same_state(optimizer.state_dict(), before)


def test_file_is_plain_safetensors_of_the_same_tensors(tmp_path):
    for bits in (32, 8):
        _, optimizer = trained(tmp_path, state_bits=bits)
        optimizer.save_state(tmp_path / "state.safetensors")
        stored = load_file(tmp_path / "state.safetensors")
        expected = {f"{i}.{name}": t for i, s in optimizer.state_dict()["state"].items() for name, t in s.items()}
        assert stored.keys() == expected.keys()
        assert all(
            torch.equal(stored[key], tensor) and stored[key].dtype == tensor.dtype for key, tensor in expected.items()
        )


def test_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    params, optimizer = trained(tmp_path)
    file = tmp_path / "state.safetensors"
    optimizer.save_state(file)
    content, written = file.read_bytes(), []

    def full(*args):
        written.append(args)
        if len(written) > 9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_dicts, "_write_at", full)
    train(optimizer, params, 1, first=9)
    with pytest.raises(OSError, match="No space left"):
        optimizer.save_state(file)
    assert file.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == [file.name]
    monkeypatch.undo()
    optimizer.save_state(file)
    assert file.read_bytes() != content, "a failed save does no harm to the optimizer"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file, content: None, "missing or damaged"),
        (lambda file, content: file.write_bytes(content[:-1]), "missing or damaged"),
        (lambda file, content: file.write_bytes(content + b"x"), "missing or damaged"),
        (lambda file, content: file.write_bytes(b"\0" * 100), "missing or damaged"),
        (lambda file, content: save_file({"a": torch.ones(1)}, str(file)), "does not hold the state of an optimizer"),
        (
            lambda file, content: file.write_bytes(content.replace(b'\\"format\\": 1', b'\\"format\\": 9')),
            "of format 9",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, make, message):
    _, optimizer = trained(tmp_path)
    file = tmp_path / "state.safetensors"
    optimizer.save_state(file)
    content = file.read_bytes()
    file.unlink()
    make(file, content)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state(file)


def test_state_is_not_saved_after_pages_were_lost(tmp_path, monkeypatch):
    params, optimizer = trained(tmp_path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(PagingError):
        train(optimizer, params, 2, missing=0)
    with pytest.raises(PagingError):
        optimizer.save_state(tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


def test_hooks_see_and_change_the_state():
    params = parameters()
    optimizer = PagedAdamW(params)
    train(optimizer, params, 1, missing=0)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(len(state["state"])))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [len(SHAPES), "loaded"] and not optimizer.state

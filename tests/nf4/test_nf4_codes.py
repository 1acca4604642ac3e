"""Averages of models over a packed base: its bytes stay what they are, whatever the recipe; the adapter is averaged."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tiny import randomize, some_ids, tiny_llama
from tiny_experts import experts_classes, tiny_experts
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

from minipeft import LoraConfig, NF4Config, get_peft_model, quantize_model
from minipeft.nf4.experts import expert_parameters, pack_weights, start_packing
from minipeft.nf4.linear import NF4Linear

DECAY = 0.9


def adapted(double: bool = True) -> Any:
    base = quantize_model(tiny_llama(), NF4Config(double_quant=double))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    randomize(model)
    return model


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in held if tensor.dtype == torch.uint8}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}


def floats(model: Any) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


def averaged_model(**arguments: Any) -> Callable[[Any, Any], None]:
    def update(ema: Any, model: Any) -> None:
        keeper = AveragedModel(ema, **arguments)
        keeper.module = ema  # not a copy of it
        keeper.n_averaged.fill_(1)
        keeper.update_parameters(model)

    return update


@torch.no_grad()
def by_copy(ema: Any, model: Any) -> None:
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old.copy_(old * DECAY + new * (1 - DECAY))


@torch.no_grad()
def by_data(ema: Any, model: Any) -> None:
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old.data = old.data * DECAY + new.data * (1 - DECAY)


@torch.no_grad()
def by_copied_data(ema: Any, model: Any) -> None:
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old.data.copy_(DECAY * old.data + (1 - DECAY) * new.data)


@torch.no_grad()
def by_assignment(ema: Any, model: Any) -> None:
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        old[...] = DECAY * old + (1 - DECAY) * new


@torch.no_grad()
def by_state(ema: Any, model: Any) -> None:
    # As timm's ModelEmaV2.
    for old, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        old.copy_(DECAY * old + (1 - DECAY) * new)


@torch.no_grad()
def by_floats(ema: Any, model: Any) -> None:
    # As timm's ModelEmaV3.
    for old, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - DECAY)
        else:
            old.copy_(new)


@torch.no_grad()
def by_lists(ema: Any, model: Any) -> None:
    torch._foreach_lerp_(floats(ema), floats(model), 1 - DECAY)


@torch.no_grad()
def by_trained(ema: Any, model: Any) -> None:
    # As diffusers' EMAModel.
    for old, new in zip(ema.parameters(), model.parameters(), strict=True):
        if new.requires_grad:
            old.sub_((1 - DECAY) * (old - new))
        else:
            old.copy_(new)


@torch.no_grad()
def by_loading(ema: Any, model: Any) -> None:
    mean = {}
    for (name, old), new in zip(ema.state_dict().items(), model.state_dict().values(), strict=True):
        average = DECAY * old + (1 - DECAY) * new
        mean[name] = average if old.is_floating_point() else average.round().to(old.dtype)
    ema.load_state_dict(mean)


RECIPES: dict[str, Callable[[Any, Any], None]] = {
    "ema": averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "ema-one-by-one": averaged_model(avg_fn=get_ema_avg_fn(DECAY)),
    "ema-with-buffers": averaged_model(multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True),
    "ema-one-by-one-with-buffers": averaged_model(avg_fn=get_ema_avg_fn(DECAY), use_buffers=True),
    **{"copy": by_copy, "data": by_data, "copied-data": by_copied_data, "assignment": by_assignment},
    **{"state": by_state, "floats": by_floats, "lists": by_lists, "trained": by_trained, "loading": by_loading},
}


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_averages_of_models(recipe: str, double: bool) -> None:
    model = adapted(double)
    ema = copy.deepcopy(model)
    before, start = packed_bytes(ema), trained(ema)
    assert len(before) == (2 if double else 1) * sum(isinstance(m, NF4Linear) for m in model.modules()) > 0
    randomize(model, seed=3)
    RECIPES[recipe](ema, model)
    after, now, ids = packed_bytes(ema), trained(model), some_ids()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name, tensor in trained(ema).items():
        torch.testing.assert_close(tensor, DECAY * start[name] + (1 - DECAY) * now[name], rtol=1e-5, atol=1e-7)
    with torch.no_grad(), model.disable_adapter(), ema.disable_adapter():
        torch.testing.assert_close(ema(ids).logits, model(ids).logits)


@pytest.mark.parametrize("recipe", RECIPES)
def test_averages_of_packed_experts(recipe: str) -> None:
    experts: Any = start_packing(tiny_experts(experts_classes()["gpt_oss.GptOssExperts"]), None)
    for name in expert_parameters(experts):
        pack_weights(experts, name, 64, True)
    twin = copy.deepcopy(experts)
    before = packed_bytes(experts)
    assert len(before) == 4
    RECIPES[recipe](twin, experts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed_bytes(twin).items())


def test_stochastic_weight_averaging_of_many_steps() -> None:
    # By torch's function for one tensor: that for lists, its default on a GPU, refuses every integer tensor itself.
    model = adapted()
    swa = AveragedModel(model, avg_fn=get_swa_avg_fn())
    before, seen = packed_bytes(model), []
    for seed in range(5):
        randomize(model, seed)
        seen.append(trained(model))
        swa.update_parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in packed_bytes(swa.module).items())
    for name, tensor in trained(swa.module).items():
        torch.testing.assert_close(tensor, sum(one[name] for one in seen) / 5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "call",
    [
        lambda codes, other: codes.copy_(codes * 0.9 + other * 0.1),
        lambda codes, other: codes.detach().copy_(other.float()),
        lambda codes, other: codes.data.copy_(other.float()),
        lambda codes, other: setattr(codes, "data", other.float()),
        lambda codes, other: codes.__setitem__(slice(3), other[:3].float()),
        lambda codes, other: codes.__setitem__(0, 0.5),
        lambda codes, other: codes.mul_(0.9).add_(other, alpha=0.1),
        lambda codes, other: codes.data.add_(other),
        lambda codes, other: codes.__iadd__(other),
        lambda codes, other: codes.lerp_(other, 0.1),
    ],
)
def test_what_would_make_other_codes_is_refused(call: Callable[[Tensor, Tensor], None]) -> None:
    model = adapted()
    layer = model.model.layers[0].mlp.up_proj
    for codes in (layer.weight, layer.absmax, model.state_dict()["model.layers.0.mlp.up_proj.weight"]):
        before, other = codes.clone(), 255 - codes.clone()
        with torch.no_grad(), pytest.raises(TypeError, match=r"codes of a packed weight.*is_floating_point"):
            call(codes, other)
        assert torch.equal(codes, before)


def test_other_codes_can_be_written() -> None:
    layer = NF4Linear.from_linear(nn.Linear(64, 32))
    other = NF4Linear.from_linear(nn.Linear(64, 32))
    with torch.no_grad():
        layer.weight.copy_(other.weight)
        layer.absmax[:] = other.absmax
    layer.nested_absmax, layer.offset = other.nested_absmax, other.offset
    assert torch.equal(layer.dequantize(), other.dequantize())
    layer.weight.data = torch.zeros_like(layer.weight)
    assert not layer.weight.any()


def guarded(layer: NF4Linear) -> bool:
    before = layer.weight.clone()
    with torch.no_grad():
        layer.weight.copy_(layer.weight * 0.9 + layer.weight * 0.1)
        layer.absmax.copy_(layer.absmax * 0.9 + layer.absmax * 0.1)
    return torch.equal(layer.weight, before)


def test_codes_stay_codes_through_copies_files_and_casts() -> None:
    layer, x = NF4Linear.from_linear(nn.Linear(64, 33)), torch.randn(3, 64)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = NF4Linear(64, 33)
    loaded.load_state_dict(copy.deepcopy(layer.state_dict()))
    assigned = NF4Linear(64, 33, device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    twins += [loaded, assigned, copy.deepcopy(layer).half().float(), copy.deepcopy(layer).to("cpu", torch.float32)]
    for twin in twins:
        assert isinstance(twin.weight, nn.Parameter) and not twin.weight.requires_grad and guarded(twin)
        assert set(dict(twin.named_parameters())) == {"weight", "bias"}
        assert set(dict(twin.named_buffers())) == set(dict(layer.named_buffers()))
        torch.testing.assert_close(twin(x), expected, rtol=1e-3, atol=1e-3)
    assert twins[0].weight.data_ptr() != layer.weight.data_ptr() == layer.state_dict()["weight"].data_ptr()


def test_files_hold_ordinary_tensors() -> None:
    state = NF4Linear.from_linear(nn.Linear(64, 33)).state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for read in (torch.load(buffer, weights_only=True), load(save(dict(state)))):
        assert {type(tensor) for tensor in read.values()} == {Tensor}
        assert all(torch.equal(read[name], state[name]) for name in state)


def test_operations_give_ordinary_tensors_and_compile() -> None:
    layer, x = NF4Linear.from_linear(nn.Linear(64, 33)), torch.randn(3, 64)
    codes = layer.weight
    assert {type(one) for one in (codes * 0.9, codes + codes, codes.clone(), codes[:3], codes.cpu().float())} == {
        Tensor
    }
    assert type(layer(x)) is Tensor and type(layer.dequantize()) is Tensor
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_a_part_of_the_state_can_be_loaded() -> None:
    model, other = adapted(), adapted()
    before = packed_bytes(model)
    randomize(other, seed=7)
    state = other.state_dict()
    part = {name: tensor for name, tensor in state.items() if "lora_A" in name and "q_proj" in name}
    result = model.load_state_dict(part, strict=False)
    adapter = [name for name, tensor in state.items() if "lora_" in name]
    assert not result.unexpected_keys and set(result.missing_keys) == set(adapter) - set(part)
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in part.items())
    assert all(torch.equal(value, before[name]) for name, value in packed_bytes(model).items())

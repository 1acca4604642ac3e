"""What an adapter trains whole (`modules_to_save`) is met by whoever calls it, and by whoever only reads it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import randomize, some_ids, tiny_llama
from torch import nn

import minipeft
from minipeft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict


class Head(nn.Module):
    """A head with parts of all kinds: layers, a container that is called and one that is not, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.stack = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.ends = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.register_buffer("offset", torch.ones(6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stack(self.dense(x) + self.offset)
        return self.ends[0](h) + self.ends[1](h)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.head = Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(x))


class ByParts(Whole):
    """As `Whole`, but nobody calls the head itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head, x = self.head, self.lin(x)
        h = head.stack(F.linear(x, head.dense.weight, head.dense.bias) + head.offset)
        for one in head.ends[:1]:
            first = one(h)
        return first + head.ends[-1](h)


def plain(kind: type[Whole] = Whole, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind().eval()


def adapted(base: nn.Module, *saved: str, **fields: Any) -> Any:
    config = LoraConfig(target_modules=["lin"], modules_to_save=[*saved], init_lora_weights=False, **fields)
    model = get_peft_model(base, config)
    randomize(model, scale=0.5)
    return model


def some_rows(seed: int = 3) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 6),
    "without bias": lambda: nn.Linear(6, 6, bias=False),
    "norm": lambda: nn.LayerNorm(6),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "head": Head,
    "sequence": lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
}


def read(module: Any) -> dict[str, torch.Tensor]:
    """All tensors inside of a module, each as its own module's attribute, by those attributes' paths."""
    found = {}
    for path, part in module.named_modules():
        if "modules_to_save" not in path:
            for name in [*part._parameters, *part._buffers]:
                found[f"{path}.{name}"] = getattr(part, name)
    return found


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(first[name] is second[name] for name in first)


@pytest.mark.parametrize("kind", LAYERS)
def test_who_reads_a_tensor_meets_that_of_the_adapter_that_acts(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"lin": nn.Linear(6, 6), "part": LAYERS[kind]()})
    names = [name for name, _ in base.named_parameters()]
    before, held = read(base["part"]), set(vars(base["part"]))
    kind_before = type(base["part"])
    model = adapted(base, "part")
    part = model["part"]
    first = read(part.modules_to_save["default"])
    assert same(read(part), first) and not any(
        a is b for a, b in zip(first.values(), before.values(), strict=True) if a is not None
    )
    assert [n for n, _ in model.named_parameters() if "lora" not in n and "modules_to_save" not in n] == names
    assert all(model.get_parameter(name) is parameter for name, parameter in model.named_parameters())
    model.add_adapter("second", LoraConfig(target_modules=["lin"], modules_to_save=["part"]))
    model.add_adapter("without", LoraConfig(target_modules=["lin"]))
    assert same(read(part), first)
    model.set_adapter("second")
    assert same(read(part), read(part.modules_to_save["second"]))
    for nothing_acts in (lambda: model.set_adapter("without"), model.disable_adapter_layers):
        nothing_acts()
        assert same(read(part), before) and same(read(part.original_module), before)
    model.enable_adapter_layers()
    model.set_adapter("default")
    with model.disable_adapter():
        assert same(read(part), before)
    # torch pickles no parametrized modules.
    pickled = [pickle.loads(pickle.dumps(model))] if kind != "parametrized" else []
    for again in (copy.deepcopy(model), *pickled):
        assert same(read(again["part"]), read(again["part"].modules_to_save["default"]))
    model.merge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(read(part).values(), first.values(), strict=True) if a is not None)
    model.unmerge_adapter()
    assert same(read(part), first)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert same(read(part), read(part.modules_to_save["second"]))
    left = model.unload()
    assert same(read(left["part"]), before) and type(left["part"]) is kind_before and set(vars(left["part"])) == held


def test_a_loss_made_of_the_heads_weight_trains_the_head_as_peft() -> None:
    losses: dict[str, list[float]] = {}
    for library in (peft, minipeft):
        config = library.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"], task_type="CAUSAL_LM"
        )
        base = tiny_llama()
        torch.manual_seed(4)
        model = library.get_peft_model(base, config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        for _ in range(3):
            hidden = base.model(some_ids()).last_hidden_state
            loss = F.cross_entropy(F.linear(hidden, base.lm_head.weight).flatten(0, 1), some_ids().flatten())
            loss = loss + base.get_input_embeddings().weight.square().mean() + base.model.norm.weight.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(library.__name__, []).append(loss.item())
    assert losses["minipeft"] == pytest.approx(losses["peft"], rel=1e-5)
    assert losses["minipeft"][0] > losses["minipeft"][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_whole_that_is_never_called_are_trained(dtype: torch.dtype) -> None:
    base = plain(ByParts).to(dtype)
    x = some_rows().to(dtype)
    model = adapted(copy.deepcopy(base), "head")
    called = adapted(plain(Whole).to(dtype), "head")
    set_peft_model_state_dict(called, get_peft_model_state_dict(model))
    exact = 1e-6 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(x), called(x), atol=exact, rtol=exact)
    assert model(x).dtype == dtype
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    out = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), out, atol=10 * exact, rtol=exact)
    model.unmerge_adapter()
    assert torch.equal(model(x), out)
    plain_again = model.merge_and_unload()
    torch.testing.assert_close(plain_again(x), out, atol=10 * exact, rtol=exact)
    assert {type(m) for m in plain_again.modules()} == {type(m) for m in base.modules()}


def test_a_sequence_is_as_long_as_it_was() -> None:
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("lin", nn.Linear(6, 6))
    base.add_module("end", nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    x, before = some_rows(), base(some_rows())
    model = adapted(base, "end")
    assert len(model.end) == 3 and [type(m) for m in model.end][1] is nn.ReLU
    assert model.end[-1].weight is model.end.modules_to_save["default"][-1].weight
    assert model.end[1:](model.end[0](model.lin(x))).equal(model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    out = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), out)


def train(model: Any, steps: int = 4) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for step in range(steps):
        model(some_rows(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_buffers_are_each_adapters_own_and_travel_as_in_peft(tmp_path: Path) -> None:
    base, x = plain(), some_rows(9)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["lin"], modules_to_save=["head"]))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["lin"], modules_to_save=["head"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "start")
    theirs.load_adapter(tmp_path / "start", "default", is_trainable=True)
    train(model), train(theirs)
    out = model(x)
    torch.testing.assert_close(out, theirs(x))
    assert not torch.equal(model.head.stack[1].running_mean, base.head.stack[1].running_mean)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys() and any("running_mean" in name for name in files[0])
    for name in ("ours", "theirs"):
        torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)(x), out)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)(x), out)
    model.add_adapter("second", LoraConfig(target_modules=["lin"], modules_to_save=["head"]))
    model.set_adapter("second")
    torch.testing.assert_close(model(x), base(x))
    train(model, 2)
    second = model(x)
    model.set_adapter("default")
    assert torch.equal(model(x), out)
    model.merge_adapter()
    torch.testing.assert_close(model(x), out)
    model.double().float().unmerge_adapter()
    assert torch.equal(model(x), out)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.set_adapter("second")
    assert torch.equal(model(x), second)
    torch.testing.assert_close(model.merge_and_unload()(x), second)


def test_a_merge_that_would_not_be_finite_is_refused() -> None:
    model = adapted(plain(), "head")
    with torch.no_grad():
        model.head.modules_to_save["default"].ends[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected.*head infinite or NaN"):
        model.merge_adapter(safe_merge=True)


def test_parameters_that_are_one_are_one_when_merged() -> None:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    model = adapted(nn.ModuleDict({"lin": nn.Linear(6, 6), "part": tied}), "part")
    x = some_rows()
    out = model["part"](x)
    merged = model.merge_and_unload()["part"]
    torch.testing.assert_close(merged(x), out)
    assert merged[0].weight is merged[1].weight


def test_a_hook_that_was_there_is_called_once() -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    calls: list[int] = []

    def double(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return out * 2

    base[1].register_forward_hook(double)
    expected = base(some_rows())
    model = get_peft_model(base, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    assert torch.equal(model(some_rows()), expected) and len(calls) == 2


@pytest.mark.parametrize(("target", "saved"), [("head.dense", None), ("lin", ["head.dense"])])
def test_one_adapter_trains_what_is_inside_of_anothers(target: str, saved: list[str] | None) -> None:
    base, x = plain(), some_rows()
    model = adapted(copy.deepcopy(base), "head")
    out = model(x)
    model.add_adapter("inner", LoraConfig(target_modules=[target], modules_to_save=saved))
    randomize(model, adapter="inner")
    assert torch.equal(model(x), out)
    model.set_adapter("inner")
    inner = model(x)
    assert not torch.allclose(inner, base(x))
    model.add_adapter("again", LoraConfig(target_modules=["lin"], modules_to_save=["head"]))
    model.set_adapter("again")
    torch.testing.assert_close(model(x), base(x))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".again" in name for name in trained) and not any("inner" in name for name in trained)
    for name, expected in (("default", out), ("inner", inner)):
        model.set_adapter(name)
        assert torch.equal(model(x), expected)
    assert {type(part) for part in model.unload().modules()} == {type(part) for part in base.modules()}
    assert torch.equal(model(x), base(x))


def test_tying_weights_again_ties_the_bases() -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), LoraConfig(modules_to_save=["embed_tokens"]))
    randomize(model)
    base = model.lm_head._parameters["weight"]
    model.tie_weights()
    assert model.lm_head._parameters["weight"] is base is model.model.embed_tokens._parameters["weight"]


def test_calls_with_other_parameters_and_compiled_calls_are_the_models() -> None:
    model = adapted(plain(ByParts), "head")
    x = some_rows()
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), model(x))
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


def test_rows_go_through_copies_of_their_own() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    model.add_adapter("second", LoraConfig(**config))
    randomize(model, scale=0.3)
    ids = some_ids(4)
    names = ["second", "__base__", "default", "second"]
    rows = []
    for name, one in zip(names, ids, strict=True):
        model.set_adapter("default" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            rows.append(model(one[None]).logits[0])
    torch.testing.assert_close(model(ids, adapter_names=names).logits, torch.stack(rows), atol=1e-5, rtol=1e-5)
    for kind in (Whole, ByParts):
        model = adapted(plain(kind), "head")
        with pytest.raises(TypeError, match=r"only supported for the following modules: Linear, .*trains a Head whole"):
            model(some_rows(), adapter_names=["default"] * 5)
        assert model(some_rows(), adapter_names=["__base__"] * 5).shape == (5, 3)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.layers, self.head = nn.Sequential(layer, copy.deepcopy(layer)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


@pytest.mark.parametrize("whole", [["layers.1"], ["layers.1", "head"], ["layers.0.self_attn"], ["norm1", "norm2"]])
def test_a_whole_layer_of_an_encoder_is_merged(whole: list[str]) -> None:
    x = torch.randn(2, 5, 8)
    model = get_peft_model(Encoder(), LoraConfig(target_modules=["linear1"], modules_to_save=whole)).eval()
    randomize(model, scale=0.3)
    expected = model(x).detach()
    plain = Encoder().eval()
    assert not torch.allclose(plain(x), expected, atol=1e-3)
    for call in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
        call()
        for recorded in (True, False):  # torch's fused operation is for inference
            with torch.set_grad_enabled(recorded):
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(type(module).__name__.startswith(("Trained", "Lora")) for module in model.modules())


def test_lora_inside_of_what_another_adapter_trains_whole_is_merged() -> None:
    x = torch.randn(2, 5, 8)
    model = get_peft_model(Encoder(), LoraConfig(target_modules=["1.linear1"]), "inside").eval()
    model.add_adapter("whole", LoraConfig(target_modules=["0.linear2"], modules_to_save=["layers.1"]))
    randomize(model, scale=0.3)
    for name in ("inside", "whole"):
        model.set_adapter(name)
        expected = model(x).detach()
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), Encoder().eval()(x))

"""LoRA on convolutions and B's bias: PEFT's numbers and files, merging, rows and combinations."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomize
from torch import nn

import minipeft
from minipeft.errors import PeftWarning
from minipeft.lora.combine import Combination

KINDS: dict[str, Any] = {
    "1d": lambda **k: nn.Conv1d(4, 6, 3, **k),
    "2d": lambda **k: nn.Conv2d(4, 6, (3, 2), **k),
    "3d": lambda **k: nn.Conv3d(4, 6, 2, **k),
    "one": lambda **k: nn.Conv2d(4, 6, 1, **k),
    "linear": lambda **k: nn.Linear(4, 6, bias=k.get("bias", True)),
}
SETTINGS: list[dict[str, Any]] = [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"groups": 2}]


class Net(nn.Module):
    """One convolution, whose output is averaged over its places, and a head."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = KINDS[kind](**settings).to(dtype)
        self.head = nn.Linear(6, 3).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv(x)
        out = self.head(torch.tanh(out.flatten(2).mean(2) if out.dim() > 2 else out))
        return out


def an_input(kind: str, rows: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    sizes = {"1d": (9,), "2d": (6, 5), "3d": (4, 3, 5), "one": (3, 4), "linear": ()}[kind]
    return torch.randn(rows, 4, *sizes, dtype=dtype, generator=torch.Generator().manual_seed(1))


def net(library: Any, kind: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    chosen = {"target_modules": ["conv"], "r": 2, "lora_alpha": 3, **config}
    model = library.get_peft_model(Net(kind, dtype, **settings), library.LoraConfig(**chosen))
    randomize(model, scale=0.4)
    return model.eval()


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace("base_layer.", "")


def cases() -> list[Any]:
    found = []
    for kind in KINDS:
        for settings in SETTINGS:
            for config in ({}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True, "lora_dropout": 0.3}):
                if kind == "linear" and settings and "bias" not in settings:
                    continue
                if "lora_bias" in config and "bias" in settings:
                    continue
                found.append((kind, settings, config))
    return found


@pytest.mark.filterwarnings("ignore:.*invalid shape. base_model.model.conv.lora_B.bias")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(("kind", "settings", "config"), cases(), ids=str)
def test_outputs_gradients_and_files_are_those_of_peft(kind: str, settings: Any, config: Any, tmp_path: Path) -> None:
    theirs, ours = net(peft, kind, settings, **config), net(minipeft, kind, settings, **config)
    names = {plain_name(name) for name, _ in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == names
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minipeft.PeftModel.from_pretrained(Net(kind, **settings), tmp_path / "theirs", is_trainable=True).eval()
    x = an_input(kind)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    expected = {plain_name(name): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Net(kind, **settings), tmp_path / "ours").eval()
    torch.testing.assert_close(again(x), ours(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all", "lora_bias": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_computes_the_same_and_unmerged_it_has_its_bits_again(kind: str, config: Any, dtype: Any) -> None:
    settings = {} if kind == "linear" else {"dilation": 2, "padding": 2, "padding_mode": "circular", "stride": 2}
    model, plain = net(minipeft, kind, settings, dtype, **config), Net(kind, dtype, **settings)
    x = an_input(kind, dtype=dtype)
    before = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    model.merge_adapter(safe_merge=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(model(x), before, atol=tolerance, rtol=tolerance)
    assert not torch.equal(model.conv.weight, plain.conv.weight)
    model.unmerge_adapter()
    for name in ("weight", "bias"):
        assert torch.equal(model.conv._parameters[name], plain.conv._parameters[name])
    merged = model.merge_and_unload()
    assert type(merged.conv) is type(plain.conv)
    torch.testing.assert_close(merged(x), before, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", [*KINDS])
def test_every_row_goes_through_its_own_adapter(kind: str) -> None:
    model = net(minipeft, kind, {}, lora_bias=True)
    model.add_adapter("other", minipeft.LoraConfig(target_modules=["conv"], r=4, use_dora=True))
    randomize(model, seed=5, scale=0.3)
    x = an_input(kind)
    alone = []
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone.append(model(x))
    rows = model(x, adapter_names=["other", "__base__", "default"])
    torch.testing.assert_close(rows[0], alone[1][0])
    torch.testing.assert_close(rows[1], Net(kind)(x)[1])
    torch.testing.assert_close(rows[2], alone[0][2])


@pytest.mark.parametrize("combination", ["svd", "cat", "linear", "ties", "ties_svd"])
@pytest.mark.parametrize("kind", [*KINDS])
def test_combinations_are_those_of_peft(kind: str, combination: str) -> None:
    models = []
    for library in (peft, minipeft):
        model = net(library, kind, {})
        model.add_adapter("other", library.LoraConfig(target_modules=["conv"], r=2, init_lora_weights=False))
        models.append(model)
    theirs, ours = (model.base_model.model.conv for model in models)
    for adapter in ("default", "other"):
        for factors in ("lora_A", "lora_B"):
            getattr(ours, factors)[adapter].load_state_dict(getattr(theirs, factors)[adapter].state_dict())
    how = {"combination_type": combination, "density": 0.5 if "ties" in combination else None}
    models[1].add_weighted_adapter(["default", "other"], [0.7, 0.2], "sum", **how)
    got = ours.get_delta_weight("sum")
    if kind in ("1d", "3d") and combination.endswith("svd"):
        # PEFT decomposes these without flattening them, and fails.
        how = Combination(combination, density=how["density"])
        whole = how.sum([ours.get_delta_weight(adapter) for adapter in ("default", "other")], [0.7, 0.2]).flatten(1)
        left, values, right = torch.linalg.svd(whole.double(), full_matrices=False)
        expected = ((left[:, :2] * values[:2]) @ right[:2]).float().view_as(got)
    else:
        models[0].add_weighted_adapter(["default", "other"], [0.7, 0.2], "sum", **how)
        expected = theirs.get_delta_weight("sum")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_convolution_in_groups_acts_and_is_not_merged() -> None:
    model, plain = net(minipeft, "2d", {"groups": 2}), Net("2d", groups=2)
    x = an_input("2d")
    with pytest.raises(NotImplementedError, match=r"Merging is not supported.*groups=2"):
        model.merge_adapter()
    assert torch.equal(model.conv.weight, plain.conv.weight) and not model.conv.merged
    with pytest.raises(ValueError, match="groups"):
        model.conv.get_delta_weight("default")
    model.add_weighted_adapter(["default"], [0.5], "scaled")
    with pytest.raises(ValueError, match="groups; take 'linear'"):
        model.add_weighted_adapter(["default", "scaled"], [0.5, 1], "sum", combination_type="cat")
    assert torch.equal(model.unload()(x), plain(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 3}, "groups=2 and rank 3"),
        ({"rank_pattern": {"conv": 5}}, "groups=2 and rank 5"),
        ({"init_lora_weights": "pissa"}, "Unknown initialization.*'pissa'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1}}, "Unknown initialization.*'loftq'"),
    ],
)
def test_what_a_convolution_cannot_have_is_refused_and_nothing_is_changed(config: Any, message: str) -> None:
    model = Net("2d", groups=2)
    with pytest.raises(ValueError, match=message):
        minipeft.get_peft_model(model, minipeft.LoraConfig(**{"target_modules": ["conv"], "r": 2, **config}))
    assert type(model) is Net and type(model.conv) is nn.Conv2d


@pytest.mark.parametrize("kind", [*KINDS])
def test_a_bias_of_b_without_a_base_bias_acts_and_is_not_merged(kind: str) -> None:
    with pytest.warns(PeftWarning, match="`lora_bias=True` was passed but the targeted layer of type .* has no bias"):
        model = net(minipeft, kind, {"bias": False}, lora_bias=True)
    before, twin = model(an_input(kind)), copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        model.merge_adapter()
    assert torch.equal(model(an_input(kind)), before) and torch.equal(twin(an_input(kind)), before)


def test_a_bias_of_b_goes_with_the_plain_starts_on_layers() -> None:
    for refused in ({"use_dora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match="The argument lora_bias=True is"):
            minipeft.LoraConfig(lora_bias=True, **refused)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for Embedding"):
        config = minipeft.LoraConfig(lora_bias=True, target_modules=["0"])
        minipeft.get_peft_model(nn.Sequential(nn.Embedding(3, 4)), config)


def test_unbatched_and_channels_last_inputs_are_those_of_the_layer() -> None:
    model = net(minipeft, "2d", {})
    x = an_input("2d")
    torch.testing.assert_close(model.conv(x[0]), model.conv(x)[0])
    before = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), before)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)

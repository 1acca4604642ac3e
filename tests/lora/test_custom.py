"""LoRA on modules of a user's own classes (`LoraConfig._register_custom_module`)."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.tuners import lora

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
TARGETS = ["mine", "plain"]


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mine, self.plain = Mine(), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(torch.tanh(self.mine(x)))


class LoraMine(lora.Linear):
    pass


class Doubled(lora.Linear):
    """Adds the update twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x) - self.base_output(x)


def config(mapping: Any = None, **fields: Any) -> LoraConfig:
    made = LoraConfig(**{"target_modules": TARGETS, "init_lora_weights": False, "r": 2, **fields})
    made._register_custom_module({Mine: LoraMine} if mapping is None else mapping)
    return made


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_custom_layer_is_adapted_merged_and_taken_off() -> None:
    plain = net()
    before = plain(X)
    model = get_peft_model(copy.deepcopy(plain), config(rank_pattern={"mine": 3}))
    assert isinstance(model.mine, LoraMine) and isinstance(model.mine, Mine)
    assert isinstance(model.mine.base_layer, Mine)
    assert not isinstance(model.plain, LoraMine)
    assert sorted(model.targeted_module_names) == TARGETS
    assert model.mine.r == {"default": 3}
    layer, scaling = model.mine, model.mine.scaling["default"]
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    expected = X.double() @ (plain.mine.weight.double() + scaling * B @ A).T
    torch.testing.assert_close(layer(X).double(), expected, rtol=1e-5, atol=1e-5)
    after = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), before)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(X), after)
    model.merge_adapter()
    torch.testing.assert_close(model(X), after)
    model.unmerge_adapter()
    assert torch.equal(model(X), after)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), after)
    assert type(merged.mine) is Mine


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_files_go_both_ways_and_the_classes_are_told_again(tmp_path: Path) -> None:
    class Theirs(peft.tuners.lora.Linear):
        pass

    base = net()
    for name, parameters in (("in_features", 6), ("out_features", 5)):
        setattr(base.mine, name, parameters)  # PEFT reads them
    their_config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False, r=2)
    their_config._register_custom_module({Mine: Theirs})
    theirs = peft.get_peft_model(copy.deepcopy(base), their_config)
    theirs.save_pretrained(tmp_path)
    stored = LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Mine"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=copy.deepcopy(stored))
    stored._register_custom_module({Mine: LoraMine})
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=stored)
    torch.testing.assert_close(ours(X), theirs(X))
    ours.save_pretrained(tmp_path / "back")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back", config=their_config)
    assert torch.equal(again(X), theirs(X))


def test_a_class_that_lora_does_not_know_is_told_and_one_that_it_knows_is_not() -> None:
    with pytest.warns(UserWarning) as caught:
        get_peft_model(net(), config())
    assert str(caught[-1].message) == f"Unsupported layer type '{Mine}' encountered, proceed at your own risk."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(net(), config({nn.Linear: Doubled}, target_modules=["plain"]))
    plain = get_peft_model(net(), LoraConfig(target_modules=["plain"], init_lora_weights=False, r=2))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 5)
    with plain.disable_adapter():
        base = plain.plain(x)
    torch.testing.assert_close(model.plain(x), base + 2 * (plain.plain(x) - base))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_adapters_of_one_module_have_one_class() -> None:
    model = get_peft_model(net(), config())
    model.add_adapter("other", LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    assert type(model.mine).__mro__[1] is LoraMine
    model.set_adapter("other")
    update = model.mine.get_delta_weight("other")
    torch.testing.assert_close(model.mine(X), X @ (model.mine.weight + update).T, rtol=1e-4, atol=1e-4)
    adapted = get_peft_model(net(), LoraConfig(target_modules=["plain"]))
    with pytest.raises(ValueError, match="carries LoRA already"):
        adapted.add_adapter("other", config({nn.Linear: Doubled}, target_modules=["plain"]))
    assert list(adapted.peft_config) == ["default"]


class Around(nn.Module, lora.LoraLayer):
    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()


@pytest.mark.parametrize("mapping", [{nn.LSTM: Around}, {nn.LSTM: nn.Linear}, {"LSTM": LoraMine}])
def test_classes_that_cannot_stand_in_front_of_a_module_are_refused(mapping: Any) -> None:
    with pytest.raises(TypeError, match="_register_custom_module: "):
        config(mapping)

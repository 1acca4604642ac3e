"""Mixtures whose routers, or whose names in files, are unlike those of most: packed, saved, loaded, trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import some_ids
from tiny_mixtures import MIXTURES
from torch import nn

from minipeft import LoraConfig, NF4Config, quantize_model
from minipeft.nf4 import NF4Linear
from minipeft.train.batches import collate
from minipeft.train.encoding import Example
from minipeft.train.loss import training_loss_sum
from minipeft.train.methods import attach

# Of the experts that these families leave dense, and of PEFT's own pattern.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(stay dense|stays dense|leaves out experts|but not the routed experts).*:UserWarning"
)
every_mixture = pytest.mark.parametrize("name", MIXTURES)


def choosing(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, by the words that their authors have for it."""
    words = ("router", "gate", "shared_expert_gate")
    return {
        path: m
        for path, m in model.named_modules()
        if any(word in path.split(".") for word in words) and list(m.parameters())
    }


@every_mixture
def test_routers_stay_dense_and_are_not_trained(name: str) -> None:
    plain = MIXTURES[name].build()
    packed = quantize_model(MIXTURES[name].build(), NF4Config())
    assert choosing(packed)
    for path, module in choosing(packed).items():
        assert not isinstance(module, NF4Linear), path
        for own, parameter in module.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(f"{path}.{own}")), path
    model: Any = attach(packed, LoraConfig(r=2, target_modules="all-linear"))
    assert model.targeted_module_names
    trained = [path for path, p in model.named_parameters() if p.requires_grad]
    assert trained and not [path for path in trained if any(path.startswith(f"{one}.") for one in choosing(plain))]
    ids = some_ids().tolist()
    training_loss_sum(model, collate([Example(row, row) for row in ids], 0)).backward()


@every_mixture
@torch.no_grad()
def test_a_packed_mixture_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    model = quantize_model(MIXTURES[name].build(), NF4Config()).eval()
    logits, kind = model(some_ids()).logits, type(model)
    for again in range(2):
        model.save_pretrained(tmp_path / str(again), max_shard_size="40KB")
        model = kind.from_pretrained(tmp_path / str(again)).eval()
        torch.testing.assert_close(model(some_ids()).logits, logits, rtol=0, atol=1e-6)

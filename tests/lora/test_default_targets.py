"""LoRA without `target_modules`, and on "all-linear", on a small random model of every type that is known."""

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tiny import randomize
from tiny_families import FAMILIES, OTHERS, RELATIVES, Family
from tiny_multimodal import SEEING
from torch import nn

from minipeft import LoraConfig, get_peft_model
from minipeft.lora.default_targets import DEFAULT_TARGETS
from minipeft.lora.layer import LoraLayer

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
FROM_ELSEWHERE = ("chatglm", "RefinedWeb", "RefinedWebModel", "btlm", "rwkv7")
every_other = pytest.mark.parametrize("family", OTHERS.values(), ids=lambda family: family.model_type)


def adapted(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def by_peft(family: Family, **config: Any) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft announces what it does with Conv1D
        model = peft.get_peft_model(family.build(), peft.LoraConfig(**config))
    layers = (n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return {name.removeprefix("base_model.model.") for name in layers}


def logits(model: Any, family: Family) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**family.batch()).logits


def check_contract(model: Any, family: Family) -> None:
    """The start is the identity, every factor B learns, and merging keeps the output."""
    # To rounding: a layer's rows may lie otherwise in memory than the plain layer's, which sums in another order.
    torch.testing.assert_close(logits(model, family), logits(family.build(), family), rtol=0, atol=1e-6)
    model.train()(**family.batch()).loss.backward()
    still = {n for n, p in model.named_parameters() if ".lora_B." in n and not p.grad.any()}
    assert not {name for name in still if "expert" not in name}
    randomize(model)
    before = logits(model, family)
    assert (before - logits(family.build(), family)).abs().max() > 1e-4
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, family), before, rtol=0, atol=2e-5)


@every_other
def test_default_targets_are_pefts_and_work(family: Family) -> None:
    model = get_peft_model(family.build(), LoraConfig())
    if family.model_type in PEFT_TARGETS:
        assert adapted(model) == by_peft(family)
    check_contract(model, family)


# Qwen2-MoE and Llama 4.
@pytest.mark.filterwarnings("ignore:target_modules takes .*, but not the routed experts:UserWarning")
@every_other
def test_all_linear_leaves_the_head_alone_whatever_the_task(family: Family) -> None:
    model = get_peft_model(family.build(), LoraConfig(target_modules="all-linear"))
    mamba = {"exclude_modules": r".*\.out_proj"} if family.model_type == "nemotron_h" else {}  # PEFT raises there
    theirs = by_peft(family, target_modules="all-linear", **mamba)
    # PEFT adapts the head of a classifier that it is not told of, and routers, which then fail.
    left = {name for name in theirs - adapted(model) if not re.search(r"classifier|router", name)}
    assert not left and adapted(model) <= theirs
    check_contract(model, family)


@pytest.mark.parametrize("family", [f for f in OTHERS.values() if f.task_type == "SEQ_CLS"][:3])
def test_all_linear_trains_a_classifiers_head_whole_when_it_knows_the_task(family: Family) -> None:
    model = get_peft_model(family.build(), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    heads = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("classifier")}
    assert heads and all(".modules_to_save." in name for name in heads)
    assert not any(name.startswith("classifier") for name in adapted(model))


def test_layers_of_a_state_space_mixer_that_are_never_called_are_refused() -> None:
    model = OTHERS["nemotron_h"].build()
    with pytest.raises(ValueError, match=r"mixer\.out_proj' is a layer whose weight its state-space mixer may read"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj"]))


class FromElsewhere(nn.Module):
    """Stands in for a model whose code comes with its weights: one layer, with linear layers of PEFT's names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = type("Config", (transformers.PreTrainedConfig,), {"model_type": kind})()
        self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(4, 4) for name in (*PEFT_TARGETS[kind], "out")})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[0].values():
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", FROM_ELSEWHERE)
def test_default_targets_of_models_whose_code_is_elsewhere(kind: str) -> None:
    model = get_peft_model(FromElsewhere(kind), LoraConfig())
    theirs = peft.get_peft_model(FromElsewhere(kind), peft.LoraConfig())
    layers = {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert adapted(model) == {name.removeprefix("base_model.model.") for name in layers}


def test_every_known_type_is_tried() -> None:
    families = (*FAMILIES.values(), *RELATIVES.values(), *OTHERS.values(), *SEEING.values())
    tried = {family.model_type for family in families}
    assert DEFAULT_TARGETS.keys() - tried == set(FROM_ELSEWHERE)


def test_default_targets_are_pefts_for_every_type_that_peft_knows() -> None:
    assert {kind: DEFAULT_TARGETS.get(kind) for kind in PEFT_TARGETS} == PEFT_TARGETS


def test_the_documentation_lists_them() -> None:
    row = re.compile(r"^\| (.+) \| (`.+`) \|$", re.MULTILINE)
    text = DOCS.read_text().split("## LoRA\n")[1].split("\n## ")[0]
    listed = {kind.strip("` "): names for kinds, names in row.findall(text) for kind in kinds.split(",")}
    others = {family.model_type for family in OTHERS.values()}
    assert listed == {kind: ", ".join(f"`{name}`" for name in DEFAULT_TARGETS[kind]) for kind in others}

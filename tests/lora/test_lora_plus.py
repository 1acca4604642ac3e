"""LoRA+: the groups that PEFT makes, and a B that learns faster."""

from typing import Any

import peft.optimizers
import pytest
import torch
from tiny import some_ids, tiny_llama
from torch import nn

import minipeft
from minipeft import LoraConfig, create_loraplus_optimizer, get_peft_model, lora_plus_groups
from minipeft.train import ConfigError
from minipeft.train.config import TrainConfig
from minipeft.train.schedule import make_optimizer, make_schedule

CONFIG: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
RATES = {"lr": 1e-3, "loraplus_lr_ratio": 16.0}


def rates_by_name(model: Any, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(p): n.removeprefix("base_model.model.") for n, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("use_dora", [False, True])
def test_groups_are_peft_s(use_dora: bool) -> None:
    config = {**CONFIG, "use_dora": use_dora, "target_modules": ["q_proj"] if use_dora else CONFIG["target_modules"]}
    ours = get_peft_model(tiny_llama(), LoraConfig(**config))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config))
    settings = {**RATES, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
    optimizers = [
        create_loraplus_optimizer(ours, torch.optim.AdamW, betas=(0.8, 0.9), **settings),
        peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, betas=(0.8, 0.9), **settings),
    ]
    sizes = [[(group["lr"], len(group["params"])) for group in optimizer.param_groups] for optimizer in optimizers]
    assert sizes[0] == sizes[1]
    expected = rates_by_name(theirs, optimizers[1].param_groups)
    assert rates_by_name(ours, optimizers[0].param_groups) == expected
    assert {rate for rate, _ in expected.values()} == {1e-3, 1.6e-2, *(() if use_dora else (1e-5,))}
    assert optimizers[0].defaults["betas"] == (0.8, 0.9)


def test_vectors_learn_fast_and_biases_are_not_decayed() -> None:
    model = get_peft_model(
        tiny_llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], use_dora=True, bias="all")
    )
    rates = rates_by_name(model, lora_plus_groups(model, loraplus_weight_decay=0.1, **RATES))
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        if "lora_A" in name:
            assert rate == (1e-3, 0.1)
        else:
            assert rate == (1.6e-2, 0.1 if "lora_B" in name or "magnitude" in name else 0.0)


def test_a_model_without_lora_has_peft_s_groups_too() -> None:
    optimizers = [
        library.create_loraplus_optimizer(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), torch.optim.AdamW, **RATES)
        for library in (minipeft, peft.optimizers)
    ]
    sizes = [[(group["lr"], len(group["params"])) for group in optimizer.param_groups] for optimizer in optimizers]
    assert sizes[0] == sizes[1]


def test_b_moves_ratio_times_as_far_in_the_first_step() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **RATES)
    model(some_ids(), labels=some_ids()).loss.backward()
    optimizer.step()
    # Adam's first step is lr times the gradient's sign.
    for name, parameter in model.named_parameters():
        if name in before:
            rate = 1.6e-2 if "lora_B" in name else 1e-3
            torch.testing.assert_close((parameter - before[name]).abs().median().item(), rate, rtol=1e-2, atol=0)


def train_config(**settings: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", output_dir="o", lr=1e-3, scheduler="linear", **settings)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw"])
def test_training_keeps_the_ratio_through_its_schedule(optimizer: str) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    config = train_config(loraplus_lr_ratio=8, optimizer=optimizer)
    made = make_optimizer(model, config)
    schedule = make_schedule(made, config, total_steps=10)
    for _ in range(5):
        made.step()
        schedule.step()
    assert sorted(group["lr"] for group in made.param_groups) == pytest.approx([5e-4, 4e-3])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="'loraplus_lr_ratio' must be greater than 0"):
        train_config(loraplus_lr_ratio=0)
    model = get_peft_model(tiny_llama(), minipeft.BottleneckConfig(reduction_factor=4))
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is for LoRA"):
        make_optimizer(model, train_config(loraplus_lr_ratio=8))
    with pytest.raises(ValueError, match="loraplus_lr_ratio must be positive, got -1"):
        lora_plus_groups(model, 1e-3, -1)

"""accelerate's Accelerator: PEFT's losses, a run that goes on from its state bit for bit, and what it hands out."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.utils import extract_model_from_parallel, is_peft_model
from accelerate.utils.modeling import get_state_dict_offloaded_model
from safetensors.torch import load_file
from tiny import randomize, some_ids, tiny_llama
from torch.utils.data import DataLoader

import minipeft
from minipeft import NF4Config, quantize_model

IDS = some_ids(16)
METHODS: dict[str, Any] = {
    "lora": lambda of: of.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "dora": lambda of: of.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "saved-head": lambda of: of.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "tokens": lambda of: of.TrainableTokensConfig(token_indices=[3, 5, 7], task_type="CAUSAL_LM"),
    "prefix": lambda of: of.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda of: of.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "bottleneck": lambda of: of.BottleneckConfig(reduction_factor=8, task_type="CAUSAL_LM"),
}


def adapted(of: Any, method: str, packed: bool = False) -> Any:
    model = quantize_model(tiny_llama(), NF4Config()) if packed else tiny_llama()
    model = of.get_peft_model(model, METHODS[method](of))
    generator = torch.Generator().manual_seed(0)
    state = sorted(of.get_peft_model_state_dict(model).items())
    values = {key: 0.1 * torch.randn(value.shape, generator=generator) + 0.1 for key, value in state}
    of.set_peft_model_state_dict(model, values)
    return model


class Run:
    """A loop as accelerate's documentation has it."""

    def __init__(self, model: Any) -> None:
        self.accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)
        made = self.accelerator.prepare(model, optimizer, DataLoader(IDS, batch_size=4), schedule)
        self.model, self.optimizer, self.batches, self.schedule = made

    def epoch(self) -> list[float]:
        seen = []
        for ids in self.batches:
            # The first token is no target: behind a prompt PEFT would have it be one.
            labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)
            loss = self.model(input_ids=ids, labels=labels).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            seen.append(loss.item())
        return seen


@pytest.mark.parametrize("method", [name for name in METHODS if name != "bottleneck"])
def test_the_losses_are_pefts(method: str) -> None:
    theirs, ours = (Run(adapted(of, method)).epoch() for of in (peft, minipeft))
    assert ours == pytest.approx(theirs, abs=1e-5) and len(set(ours)) == 4


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_state_bit_for_bit(method: str, packed: bool, tmp_path: Path) -> None:
    run = Run(adapted(minipeft, method, packed))
    run.epoch()
    run.accelerator.save_state(str(tmp_path / "state"))
    expected = run.epoch()
    again = Run(adapted(minipeft, method, packed))
    again.accelerator.load_state(str(tmp_path / "state"))
    assert again.epoch() == expected
    # Into the run that went on, too.
    run.accelerator.load_state(str(tmp_path / "state"))
    assert run.epoch() == expected


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_what_it_hands_out_is_the_model_and_its_state(packed: bool, tmp_path: Path) -> None:
    model = adapted(minipeft, "lora", packed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = Run(model)
    accelerator = run.accelerator
    assert accelerator.unwrap_model(run.model) is model and is_peft_model(run.model)
    given = accelerator.get_state_dict(run.model)
    assert given.keys() == state.keys() and all(torch.equal(given[name], state[name]) for name in state)
    model.save_pretrained(
        tmp_path, state_dict=given, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    stored = load_file(tmp_path / "adapter_model.safetensors")
    expected = minipeft.get_peft_model_state_dict(model)
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)
    loaded = minipeft.PeftModel.from_pretrained(
        quantize_model(tiny_llama(), NF4Config()) if packed else tiny_llama(), tmp_path
    )
    assert torch.equal(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


def test_a_compiled_model_is_unwrapped() -> None:
    model = adapted(minipeft, "lora")
    compiled = torch.compile(model, backend="eager")
    accelerator = Accelerator(cpu=True)
    assert accelerator.unwrap_model(compiled, keep_torch_compile=False) is model
    assert extract_model_from_parallel(torch.nn.DataParallel(model)) is model


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_the_state_of_an_offloaded_model_has_its_values(packed: bool) -> None:
    model = adapted(minipeft, "lora", packed)
    randomize(model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model, torch.device("cpu"))
    given = get_state_dict_offloaded_model(model)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())

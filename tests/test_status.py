"""Status of layers and models: PEFT's, field by field; and FSDP, which takes parameters out of their modules."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from processes import run_process
from tiny import tiny_gpt2, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import minipeft
from minipeft import LoraConfig, PrefixTuningConfig, get_layer_status, get_model_status, get_peft_model


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 4)
        self.lin0 = nn.Linear(4, 4)
        self.conv = Conv1D(4, 4)
        self.lin1 = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.conv(self.lin0(self.emb(ids))))


def plain(model: Any) -> Any:
    return model


def merged(model: Any) -> Any:
    model.merge_adapter(["default"])
    return model


def switched(model: Any) -> Any:
    model.set_adapter("other")
    return model


def disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def one_disabled(model: Any) -> Any:
    model.base_model.model.lin0.enable_adapters(False)
    return model


def one_switched(model: Any) -> Any:
    model.base_model.model.lin0.set_adapter("other")
    return model


def one_merged(model: Any) -> Any:
    layer, names = model.base_model.model.lin0, ("default",)
    layer.merge(adapter_names=list(names))
    return model


def one_frozen(model: Any) -> Any:
    model.base_model.model.lin0.lora_A["default"].weight.requires_grad = False
    return model


def one_put_in(model: Any) -> Any:
    model.base_model.model.lin0.lora_embedding_A["default"] = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    return model


@pytest.mark.parametrize(
    "change", [plain, merged, switched, disabled, one_disabled, one_switched, one_merged, one_frozen, one_put_in]
)
def test_every_field_is_pefts(change: Any) -> None:
    found = []
    for lib in (minipeft, peft):
        first = lib.LoraConfig(target_modules=["emb", "lin0", "conv"], modules_to_save=["lin1"])
        model = lib.get_peft_model(Mixed(), first)
        model.add_adapter("other", lib.LoraConfig(target_modules=["lin0"], bias="none"))
        model = change(model)
        layers = sorted(map(dataclasses.asdict, model.get_layer_status()), key=lambda layer: layer["name"])
        status = dataclasses.asdict(model.get_model_status())
        for layer in layers if change in (merged, one_merged) else ():
            # modules_to_save are merged here.
            layer["merged_adapters"] = [] if layer["name"] == "model.lin1" else layer["merged_adapters"]
            status["merged_adapters"] = None
        if change is one_put_in:
            del status["total_params"]  # an empty holder is no module here, so it counts nothing
        if change in (switched, one_switched):
            # A trained copy stays the one that acts in PEFT when another adapter is set that has none.
            layers = [layer for layer in layers if layer["name"] != "model.lin1"]
            for field in ("active_adapters", "requires_grad", "trainable_params"):
                del status[field]
        found.append((layers, status))
    assert found[0] == found[1]


def test_injected_adapters_have_a_status_too() -> None:
    model = minipeft.inject_adapter_in_model(LoraConfig(target_modules=["c_attn"]), tiny_gpt2())
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("GPT2LMHeadModel", "None", {})
    assert status.active_adapters == status.available_adapters == ["default"] and status.num_adapter_layers == 2
    layer = get_layer_status(model)[0]
    assert (layer.name, layer.module_type) == ("transformer.h.0.attn.c_attn", "lora.Linear")
    assert get_model_status(minipeft.inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), Mixed())) != status


@pytest.mark.parametrize("ask", [get_layer_status, get_model_status])
def test_a_model_without_adapters_has_none(ask: Any) -> None:
    with pytest.raises(ValueError, match="No adapter layers found in the model, a Linear"):
        ask(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_has_the_status_of_the_model() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert get_model_status(torch.compile(model)) == get_model_status(model)


def test_other_methods_and_packed_layers_say_what_they_are() -> None:
    model = get_peft_model(tiny_llama(), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    assert get_model_status(model).adapter_model_type == "PrefixModel"
    packed = minipeft.quantize_model(tiny_llama(), minipeft.NF4Config())
    model = get_peft_model(packed, LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert get_model_status(model).quantization_backend == "irregular"
    assert {layer.quantization_backend for layer in get_layer_status(model)} == {"nf4", None}
    biases = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], bias="all"))
    assert get_model_status(biases).num_adapter_layers == 2


FSDP = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from tiny import randomize, some_ids, tiny_llama
from minipeft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = dict(target_modules=["q_proj", "v_proj", "embed_tokens"], modules_to_save=["lm_head"])
def make():
    return get_peft_model(tiny_llama(attention_bias=True), LoraConfig(**config))
model = make()
randomize(model)
expected = model(some_ids()).logits
with model.disable_adapter():
    base = model(some_ids()).logits
sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
loss = sharded(some_ids(), labels=some_ids()).loss
loss.backward()
assert torch.allclose(sharded(some_ids()).logits, expected, atol=1e-6)
with model.disable_adapter():
    assert torch.allclose(sharded(some_ids()).logits, base, atol=1e-6)
state = get_peft_model_state_dict(sharded)
again = make()
set_peft_model_state_dict(again, state)
assert torch.allclose(again(some_ids()).logits, expected, atol=1e-6)
print("done")
"""


def test_fully_sharded_models_train_and_give_their_adapter() -> None:
    done = run_process([sys.executable, "-c", FSDP], env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    assert done.stdout.strip().endswith("done"), done.stderr[-3000:]

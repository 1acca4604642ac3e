"""Arguments of scripts that are about the base model: taken, and answered where the model is otherwise."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama

from minipeft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)
from minipeft.errors import PeftWarning


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    return tmp_path


MET: list[dict[str, Any]] = [
    *({name: torch.float32} for name in ("torch_dtype", "dtype")),
    *({"torch_dtype": dtype} for dtype in ("auto", "float32", "torch.float32", None)),
    *(
        {"device_map": place}
        for place in ("auto", "cpu", {"": "cpu"}, torch.device("cpu"), {"": torch.device("cpu")}, None)
    ),
    *({name: None} for name in ("max_memory", "offload_folder", "offload_dir", "quantization_config")),
    *({name: False} for name in ("load_in_8bit", "load_in_4bit", "offload_buffers", "use_flash_attention_2")),
    {
        "use_safetensors": True,
        "low_cpu_mem_usage": True,
        "torch_device": "cpu",
        "trust_remote_code": True,
        "token": None,
    },
    {"is_trainable": True, "autocast_adapter_dtype": False, "key_mapping": {}, "ignore_mismatched_sizes": True},
    {"attn_implementation": "sdpa", "adapter_name": "other", "revision": "main", "local_files_only": True},
]
NOT_MET: list[tuple[dict[str, Any], str]] = [
    ({"torch_dtype": torch.float16}, r"torch_dtype=torch.float16 \(the base model is in float32\)"),
    ({"dtype": "bfloat16"}, r"dtype='bfloat16' \(the base model is in float32\)"),
    ({"device_map": {"": 0}}, r"device_map=\{'': 0\} \(the base model lies on cpu\)"),
    ({"device_map": "cuda:0"}, r"device_map='cuda:0' \(the base model lies on cpu\)"),
    ({"device_map": {"model": "cpu", "lm_head": "disk"}}, r"lies on cpu"),
    (
        {"offload_folder": "off"},
        r"offload_folder='off' \(the base model was not dispatched, and nothing is offloaded\)",
    ),
    (
        {"max_memory": {0: "1GB"}, "offload_dir": "off"},
        r"max_memory=.*, offload_dir='off' \(the base model was not disp",
    ),
    ({"load_in_8bit": True}, r"load_in_8bit=True \(the base model is not quantized\)"),
    ({"attn_implementation": "eager"}, r"attn_implementation='eager' \(the base model has 'sdpa'\)"),
]


@pytest.mark.parametrize("given", MET, ids=str)
def test_what_is_so_is_taken_in_silence(given: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(tiny_llama(), folder, **given)


@pytest.mark.parametrize(("given", "answer"), NOT_MET, ids=str)
def test_what_is_not_so_is_told_by_name(given: dict[str, Any], answer: str, folder: Path) -> None:
    with pytest.warns(PeftWarning, match=answer):
        model = PeftModel.from_pretrained(tiny_llama(), folder, **given)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_a_quantized_or_dispatched_model_has_is_met(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(quantize_model(tiny_llama()), folder, load_in_4bit=True)
        dispatched = tiny_llama()
        dispatched.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
        placed = {"device_map": dispatched.hf_device_map, "offload_folder": "off", "max_memory": {"cpu": "1GB"}}
        PeftModel.from_pretrained(dispatched, folder, **placed)


def test_unknown_arguments_and_pickles_are_errors(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"load_adapter\(\) does not take 'is_trainble'"):
        PeftModel.from_pretrained(tiny_llama(), folder, is_trainble=True)
    with pytest.raises(ValueError, match="use_safetensors=False asks for a pickle"):
        PeftModel.from_pretrained(tiny_llama(), folder, use_safetensors=False)
    with pytest.raises(ValueError, match=r"has shape \(2, 64\), expected \(2, 32\)"):
        other = tiny_llama(hidden_size=32)
        PeftModel.from_pretrained(other, folder, ignore_mismatched_sizes=True)


def test_a_run_on_a_gpu_is_noted_where_the_method_has_it(folder: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), folder, ephemeral_gpu_offload=True)
    assert model.peft_config["default"].runtime_config.ephemeral_gpu_offload
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "prompt")
    with pytest.warns(UserWarning, match="Ephemeral GPU offloading is not supported"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "prompt", ephemeral_gpu_offload=True)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_preparing_after_the_adapter_leaves_it_trainable(checkpointing: bool) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(before) == 5
    prepared = prepare_model_for_kbit_training(model, checkpointing)
    assert {name for name, parameter in prepared.named_parameters() if parameter.requires_grad} == before

"""`minipeft inspect --for`: what vLLM and llama.cpp make of our files, by their own arithmetic; what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ok, refused
from safetensors.torch import load_file
from tiny import tiny_gpt2, tiny_llama

from minipeft import LoraConfig, PrefixTuningConfig, get_peft_model

IDS = torch.tensor([[5, 9, 70, 71, 72]])


def saved(folder: Path, config: Any, model: Any = None) -> tuple[Path, torch.Tensor]:
    """An adapter that does something, and the logits of its model."""
    torch.manual_seed(0)
    model = get_peft_model(model or tiny_llama(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(IDS).logits


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings)


def as_served(folder: Path, server: str) -> torch.Tensor:
    """Logits of the base with s B A added to each layer that a file's names lead to, with s as the server takes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = tiny_llama().eval()
    for name, a in tensors.items():
        if not name.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        rows = len(a) if server == "llama.cpp" else config["r"]
        s = config["lora_alpha"] / (math.sqrt(rows) if server == "vllm" and config["use_rslora"] else rows)
        update = s * b.double() @ a.double()
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        weight = model.get_submodule(module).weight
        weight.data += (update.T if "embedding" in name else update).to(weight.dtype)
    with torch.no_grad():
        return model(IDS).logits


READ = {
    "plain": ({}, ("vllm", "llama.cpp")),
    "a rank that is no power of two": ({"r": 5, "lora_alpha": 7}, ("vllm", "llama.cpp")),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, ("vllm", "llama.cpp")),
    "rsLoRA": ({"use_rslora": True}, ("vllm",)),
    "ranks by pattern": ({"rank_pattern": {"q_proj": 2}}, ("llama.cpp",)),
    "alphas by pattern": ({"alpha_pattern": {"q_proj": 3}}, ()),
    "ranks and alphas that make one scaling": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        ("vllm",),
    ),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("server", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("kind", READ)
def test_what_is_said_to_be_read_acts_there_as_here_and_the_rest_would_not(
    tmp_path: Path, kind: str, server: str
) -> None:
    settings, readers = READ[kind]
    folder, logits = saved(tmp_path / "adapter", lora(**settings))
    off = (as_served(folder, server) - logits).abs().max().item()
    if server in readers:
        assert off < 1e-4
        assert f"{server} reads {folder}: LoRA on" in ok("inspect", "--for", server, folder)
    else:
        assert off > 1e-3
        assert "would be scaled otherwise" in refused("inspect", "--for", server, folder)


@pytest.mark.parametrize(
    ("settings", "server", "reason"),
    [
        ({"use_dora": True}, "both", "use_dora is not read"),
        ({"modules_to_save": ["lm_head"]}, "both", "modules_to_save (lm_head) is not read"),
        ({"bias": "lora_only"}, "both", "bias must be 'none', it is 'lora_only'"),
        ({"lora_bias": True}, "both", "no lora_A or lora_B, such as base_model.model.model.layers.0"),
        ({"trainable_token_indices": [1, 2]}, "both", "trainable_tokens_delta"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "both", "layer_replication is not read"),
        ({"r": 600}, "vllm", "ranks go to 512, it has 600"),
    ],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_a_server_refuses_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], server: str, reason: str
) -> None:
    folder, _ = saved(tmp_path / "adapter", lora(**settings))
    for name in ("vllm", "llama.cpp") if server == "both" else (server,):
        sentence = refused("inspect", "--for", name, folder)
        assert reason in sentence and "minipeft merge" in sentence
    if server == "vllm":
        assert "reads" in ok("inspect", "--for", "llama.cpp", folder)


def test_other_methods_other_shapes_and_other_folders_are_refused_by_name(tmp_path: Path) -> None:
    prefix, _ = saved(tmp_path / "prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert "it is a PREFIX_TUNING adapter, and only LoRA is read" in refused("inspect", "--for", "vllm", prefix)
    (tmp_path / "empty").mkdir()
    assert "holds no adapter_config.json" in refused("inspect", "--for", "vllm", tmp_path / "empty")
    assert "not allowed with argument" in refused("inspect", "--for", "vllm", "--verify", prefix)
    assert "invalid choice: 'tgi'" in refused("inspect", "--for", "tgi", prefix)


def test_the_rank_that_vllm_must_be_given_is_named(tmp_path: Path) -> None:
    for rank, asked in ((1, 8), (16, 16), (17, 32), (300, 320)):
        folder, _ = saved(tmp_path / str(rank), lora(r=rank))
        assert f"--max-lora-rank {asked} " in ok("inspect", "--for", "vllm", folder)
    folder, _ = saved(tmp_path / "gpt2", lora(target_modules=["c_attn"]), tiny_gpt2())
    assert "takes LoRA on c_attn" in ok("inspect", "--for", "vllm", folder)

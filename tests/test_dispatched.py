"""Adapters over models that accelerate dispatched, before or after, and over modules with a forward of their own."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from tiny import randomize, some_ids, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from minipeft import (
    BottleneckConfig,
    LoraConfig,
    NF4Config,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    quantize_model,
)
from minipeft.attach import adapter_parameters

IDS = some_ids()
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
TARGETS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(**TARGETS),
    "DoRA": lambda: LoraConfig(**TARGETS, use_dora=True),
    "PiSSA": lambda: LoraConfig(**TARGETS, init_lora_weights="pissa"),
    "LoRA on both ends": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "a parameter": lambda: LoraConfig(r=4, target_parameters=["q_proj.weight"]),
    "modules trained whole": lambda: LoraConfig(**TARGETS, modules_to_save=["norm", "lm_head"]),
    "trained tokens": lambda: TrainableTokensConfig(token_indices=[3, 5, 7]),
    "bottleneck": BottleneckConfig.houlsby,
    "invertible": lambda: BottleneckConfig.from_adapterhub("seq_bn_inv"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
# Tensors of the decoder itself, for which a device_map of its parts has no place.
IN_THE_DECODER = ("prefix", "prompt")


def with_hooks(model: Any, folder: Path) -> Any:
    return dispatch_model(model, dict.fromkeys(PARTS, "cpu"), force_hooks=True)


def on_cpu(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device="cpu")


def on_disk(model: Any, folder: Path) -> Any:
    places = {**dict.fromkeys(PARTS, "disk"), "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def on_disk_with_buffers(model: Any, folder: Path) -> Any:
    return disk_offload(model, folder, execution_device=torch.device("cpu"), offload_buffers=True)


def with_own_forwards(model: Any, folder: Path) -> Any:
    """As Liger patches modules."""
    for module in list(model.modules()):
        if type(module).__name__ in ("Linear", "LlamaMLP", "LlamaRMSNorm", "Embedding"):
            function = type(module).forward
            module.forward = types.MethodType(lambda self, *args, own=function, **kw: own(self, *args, **kw), module)
    return model


WAYS = {"hooks": with_hooks, "offloaded": on_cpu, "on disk": on_disk, "on disk, buffers too": on_disk_with_buffers}


def base(packed: bool = False) -> Any:
    return quantize_model(tiny_llama(), NF4Config()) if packed else tiny_llama()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def moved(model: Any) -> Any:
    """Move the adapters' tensors away from their starts, alike in every model."""
    generator = torch.Generator().manual_seed(2)
    own = {id(parameter) for _, parameter in adapter_parameters(model)}
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if id(parameter) in own:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def losses(model: Any) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for _ in range(3):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


def check_the_rest(model: Any, plain: torch.Tensor, acting: torch.Tensor, folder: Path, packed: bool) -> None:
    """The file, disabling, merging and unloading of `model`, whose logits are `acting`, `plain` without adapters."""
    with model.disable_adapter():
        close(logits(model), plain)
    model.save_pretrained(folder)
    close(logits(PeftModel.from_pretrained(base(packed), folder)), acting)
    if not model.peft_config["default"].mergeable:
        close(logits(model.unload()), plain)
        return
    model.merge_adapter(safe_merge=True)
    close(logits(model), acting)
    model.unmerge_adapter()
    close(logits(model), acting)
    merged = model.merge_and_unload()
    close(logits(merged), acting)
    assert type(merged) is type(tiny_llama()) and type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


CASES = [(method, way, False) for method in CONFIGS for way in WAYS]
CASES += [(method, way, True) for method in ("LoRA", "DoRA", "modules trained whole", "prompt") for way in WAYS]


@pytest.mark.parametrize(("method", "way", "packed"), CASES)
def test_a_dispatched_model_is_adapted_as_one_in_memory(method: str, way: str, packed: bool, tmp_path: Path) -> None:
    plain = logits(base(packed))
    here = moved(get_peft_model(base(packed), CONFIGS[method]()))
    model = moved(get_peft_model(WAYS[way](base(packed), tmp_path / "offload"), CONFIGS[method]()))
    close(logits(model), logits(here))
    assert losses(model) == pytest.approx(losses(here), rel=1e-5)
    acting = logits(here)
    assert (acting - plain).abs().max() > 1e-3
    close(logits(model), acting)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.is_meta]
    check_the_rest(model, plain, acting, tmp_path / "adapter", packed)
    stored = PeftModel.from_pretrained(WAYS[way](base(packed), tmp_path / "again"), tmp_path / "adapter")
    close(logits(stored), acting)


@pytest.mark.parametrize(
    ("method", "way", "packed"),
    [case for case in CASES if case[0] not in IN_THE_DECODER or case[1] in ("offloaded", "on disk, buffers too")],
)
def test_an_adapted_model_is_dispatched(method: str, way: str, packed: bool, tmp_path: Path) -> None:
    plain = logits(base(packed))
    model = moved(get_peft_model(base(packed), CONFIGS[method]()))
    acting = logits(model)
    model = WAYS[way](model, tmp_path / "offload")
    close(logits(model), acting)
    check_the_rest(model, plain, acting, tmp_path / "adapter", packed)


@pytest.mark.parametrize("first", ["patch", "adapter"])
@pytest.mark.parametrize("method", CONFIGS)
def test_modules_with_forwards_of_their_own_are_adapted(method: str, first: str, tmp_path: Path) -> None:
    here = moved(get_peft_model(tiny_llama(), CONFIGS[method]()))
    if first == "patch":
        model = moved(get_peft_model(with_own_forwards(tiny_llama(), tmp_path), CONFIGS[method]()))
    else:
        model = with_own_forwards(moved(get_peft_model(tiny_llama(), CONFIGS[method]())), tmp_path)
    close(logits(model), logits(here))
    check_the_rest(model, logits(tiny_llama()), logits(here), tmp_path / "adapter", packed=False)


def test_a_patch_stays_behind_the_hook_that_came_after_it(tmp_path: Path) -> None:
    model = tiny_llama()
    module = model.model.layers[0].self_attn.q_proj
    module.forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), module)
    plain = logits(model)
    model = moved(get_peft_model(with_hooks(model, tmp_path), CONFIGS["LoRA"]()))
    assert (logits(model) - plain).abs().max() > 1e-3
    close(logits(model.unload()), plain)


def test_hooks_that_are_removed_leave_the_adapter(tmp_path: Path) -> None:
    for name, way in WAYS.items():
        model = moved(get_peft_model(way(tiny_llama(), tmp_path / name), CONFIGS["LoRA"]()))
        acting = logits(model)
        if way not in (on_disk, on_disk_with_buffers):  # accelerate brings nothing back from a disk
            remove_hook_from_submodules(model)
            close(logits(model), acting)
        close(logits(model.unload()), logits(tiny_llama()))


def test_rows_of_a_batch_go_through_adapters_of_their_own(tmp_path: Path) -> None:
    models = []
    for way in (lambda model, folder: model, on_cpu):
        model = get_peft_model(way(tiny_llama(), tmp_path), CONFIGS["LoRA"](), "a")
        model.add_adapter("b", CONFIGS["LoRA"]())
        models.append(moved(model).eval())
    with torch.no_grad():
        here, there = (model(IDS, adapter_names=["a", "b"]).logits for model in models)
    close(there, here)


def test_a_file_of_pefts_over_a_base_on_disk_gives_pefts_logits(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**TARGETS, init_lora_weights=False, use_dora=True))
    theirs.save_pretrained(tmp_path / "adapter")
    places = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    )
    model = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    close(logits(model), logits(theirs))
    close(logits(model.merge_and_unload()), logits(theirs))


def test_a_weight_without_values_is_not_merged() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    with pytest.raises(ValueError, match=r"its weight has no values \(device meta\)"):
        get_peft_model(model, CONFIGS["LoRA"]()).merge_and_unload()


def test_no_weight_of_the_model_is_copied_with_a_module_that_is_trained_whole(tmp_path: Path) -> None:
    model = on_cpu(tiny_llama(), tmp_path)
    weights = model.lm_head._hf_hook.weights_map
    model = get_peft_model(model, CONFIGS["modules trained whole"]())
    assert model.lm_head._hf_hook.weights_map is weights
    twin = model.lm_head.modules_to_save["default"]
    assert not {"_hf_hook", "_old_forward", "forward"} & vars(twin).keys()
    randomize(model)
    assert torch.isfinite(logits(model)).all()

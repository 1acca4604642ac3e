"""New weights in place, of any rank: no compiling again; and loading one more adapter costs what the first one did."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.utils.hotswap
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import randomize, some_ids, tiny_llama
from torch import nn
from torch._dynamo.testing import CompileCounter

import minipeft
from minipeft import (
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    hotswap_adapter,
)
from minipeft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"]}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(some_ids()).logits


def saved(directory: Path, seed: int, **changes: Any) -> torch.Tensor:
    """Save an adapter to `directory`; what the model gives with it."""
    model = get_peft_model(tiny_llama(), LoraConfig(**{**CONFIG, **changes})).eval()
    randomize(model, seed=seed, scale=0.2)
    model.save_pretrained(directory)
    return logits(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compiled_model_takes_new_weights_without_compiling_again(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first", 1), saved(tmp_path / "second", 2)
    third = saved(tmp_path / "third", 3, r=2, lora_alpha=32, use_rslora=True)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first")
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    torch.testing.assert_close(logits(compiled), first)
    count = counter.frame_count
    assert count > 0
    model.load_adapter(tmp_path / "second", "default")
    torch.testing.assert_close(logits(compiled), second)
    hotswap_adapter(model, tmp_path / "third", "default")
    torch.testing.assert_close(logits(compiled), third, rtol=1e-4, atol=1e-5)
    hotswap_adapter(model, tmp_path / "first", "default")
    torch.testing.assert_close(logits(compiled), first)
    assert counter.frame_count == count


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 2},
        {"lora_alpha": 3},
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 5}},
    ],
)
def test_other_ranks_and_scalings_are_fitted(changes: dict[str, Any], tmp_path: Path) -> None:
    expected = saved(tmp_path, 1, **changes)
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG)).eval()
    tensors = {n: p for n, p in model.named_parameters() if "lora_" in n}
    randomize(model)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert all(model.get_parameter(name) is tensor and tensor.requires_grad for name, tensor in tensors.items())
    # What is saved then is the new adapter, in the terms of the config that is there.
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"use_dora": True, "target_modules": ["q_proj"]}, "use_dora is True"),
        ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "unknown tensors"),
        (
            {"init_lora_weights": "pissa", "target_modules": ["q_proj"]},
            "adapters that change the base are not hot-swapped",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, 1, **changes)
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG)).eval()
    randomize(model)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 6},
        {"r": 6, "lora_alpha": 5, "target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens"], "use_rslora": True},
        {"r": 2, "rank_pattern": {"0.self_attn.q_proj": 7}, "alpha_pattern": {"embed_tokens": 3}},
    ],
)
def test_larger_ranks_make_room_and_layers_that_are_not_adapted_act_as_the_base_model_s(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    expected = saved(tmp_path, 1, **changes)
    model = get_peft_model(tiny_llama(), LoraConfig(**{**CONFIG, "alpha_pattern": {"q_proj": 3}})).eval()
    randomize(model)
    parameters = dict(model.named_parameters())
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    if changes.get("target_modules") == ["q_proj"]:  # PEFT takes no other settings, and no stored embedding
        theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**CONFIG)).eval()
        peft.utils.hotswap.hotswap_adapter(theirs, str(tmp_path), "default")
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    assert all(model.get_parameter(name) is tensor for name, tensor in parameters.items())
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    hotswap_adapter(model, tmp_path / "again", "default")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_whose_tensors_are_lost_is_not_taken_for_one_that_is_not_adapted(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.self_attn.q_proj" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG)).eval()
    randomize(model)
    before = logits(model)
    with pytest.raises(ValueError, match=r"missing tensors .*layers\.1\.self_attn\.q_proj"):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_making_room_changes_no_output_and_no_saved_adapter(use_rslora: bool, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.self_attn.q_proj": 5}}
    config = {**CONFIG, **patterns, "use_rslora": use_rslora}
    model = get_peft_model(tiny_llama(), LoraConfig(**config)).eval()
    randomize(model)
    model.set_requires_grad("default", False)
    before = logits(model)
    other = LoraConfig(**config)
    prepare_model_for_compiled_hotswap(model, target_rank=7, config={"default": other})
    torch.testing.assert_close(logits(model), before)
    for one in (model.peft_config["default"], other):
        assert one.r == 7 and one.rank_pattern == {"q_proj": 7}
    layer = model.model.layers[1].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (7, 64) and layer.lora_A["default"].out_features == 7
    assert layer.r["default"] == 7 and not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    for library in (peft, minipeft):
        again = library.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
        torch.testing.assert_close(logits(again), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_a_model_with_room_takes_every_rank_without_compiling_again(tmp_path: Path) -> None:
    outputs = {r: saved(tmp_path / str(r), r, r=r, lora_alpha=3 * r + 1) for r in (2, 4, 6)}
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "4")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    logits(compiled)
    count = counter.frame_count
    for r in (6, 2, 4, 6):
        hotswap_adapter(compiled, tmp_path / str(r), "default")
        torch.testing.assert_close(logits(compiled), outputs[r], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == count
    saved(tmp_path / "7", 7, r=7)
    with pytest.raises(ValueError, match="r=7, and the compiled model room for 6; call prepare_model_for"):
        hotswap_adapter(compiled, tmp_path / "7", "default")
    torch.testing.assert_close(logits(compiled), outputs[6], rtol=1e-4, atol=1e-5)


def test_room_is_made_before_compiling_and_only_where_there_is_lora() -> None:
    model, other = (get_peft_model(tiny_llama(), LoraConfig(**CONFIG)) for _ in range(2))
    other.model.layers[0].compile(backend="eager")
    for compiled in (torch.compile(model, backend="eager"), other):
        with pytest.raises(ValueError, match=r"\*before\* compiling"):
            prepare_model_for_compiled_hotswap(compiled)
        with pytest.warns(minipeft.PeftWarning, match="compiled already|already compiled"):
            prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
        prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
        with pytest.raises(ValueError, match="got 'no'"):
            prepare_model_for_compiled_hotswap(compiled, check_compiled="no")
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(tiny_llama(), target_rank=8)
    with pytest.raises(ValueError, match=r"target rank 3, but the original rank is larger \(4\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_swapped_too(groups: int, tmp_path: Path) -> None:
    def net() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups), nn.Flatten(), nn.Linear(16, 3))

    x, outputs = torch.randn(2, 4, 4, 4), {}
    for r in (2, 6):
        config = LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False, lora_bias=True)
        model = get_peft_model(net(), config)
        randomize(model, seed=r)
        model.save_pretrained(tmp_path / str(r))
        outputs[r] = model(x)
    model = PeftModel.from_pretrained(net(), tmp_path / "2")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.testing.assert_close(model(x), outputs[2])
    for r in (6, 2):
        hotswap_adapter(model, tmp_path / str(r), "default")
        torch.testing.assert_close(model(x), outputs[r], rtol=1e-4, atol=1e-5)
    if groups > 1:
        with pytest.raises(ValueError, match="target rank is not divisible by 2"):
            prepare_model_for_compiled_hotswap(model, target_rank=7)


def test_tensors_in_memory_are_swapped_in(tmp_path: Path) -> None:
    expected = saved(tmp_path, 1, r=2)
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG), adapter_name="one").eval()
    stored = {
        name.replace(".weight", ".one.weight") if "embedding" not in name else f"{name}.one": tensor
        for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if "base_layer" not in name
    }
    hotswap_adapter_from_state_dict(model, stored, "one", LoraConfig(**{**CONFIG, "r": 2}))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_only_an_unmerged_lora_adapter_that_is_there_is_swapped(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        hotswap_adapter(model, tmp_path, "other")
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        hotswap_adapter(model, tmp_path / "nowhere", "default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged"):
        hotswap_adapter(model, tmp_path, "default")
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="not PrefixTuningConfig by LoraConfig"):
        hotswap_adapter(model, tmp_path, "prefix")


def calls_in(function: Callable[[], object]) -> int:
    """How many Python and C functions run: work, counted where a clock would only guess."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()  # finalizers are not the function's work
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


VIRTUAL = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(**CONFIG),
    "lora with a head": LoraConfig(**CONFIG, modules_to_save=["lm_head"]),
    "dora": LoraConfig(**CONFIG, use_dora=True),
    "bottleneck": BottleneckConfig.houlsby(bottleneck_size=4),
    "prefix": PrefixTuningConfig(**VIRTUAL),
    "prompt": PromptTuningConfig(**VIRTUAL),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_loading_the_thirtieth_adapter_is_the_work_of_the_first(kind: str, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), ADAPTERS[kind]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="a1")
    work = [calls_in(lambda number=number: model.load_adapter(tmp_path, f"a{number}")) for number in range(2, 31)]
    # A cache that fills up makes single calls differ by a few.
    assert min(work) > 1000 and max(work) < 1.01 * min(work)

"""New weights in place: no compiling again; and loading one more adapter costs the same however many there are."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomize, some_ids, tiny_llama
from torch._dynamo.testing import CompileCounter

from minipeft import (
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    hotswap_adapter,
)

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
        ({"r": 6}, "the new adapter has r=6, more than the 4"),
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"target_modules": ["q_proj"]}, "missing tensors"),
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

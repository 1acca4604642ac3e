"""What every method does on every family of models, over plain and NF4 base weights: docs/families.md, tried."""

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from tiny import randomize, some_ids
from tiny_families import FAMILIES, RELATIVES, tiny_gemma3_with_images

from minipeft import (
    BottleneckConfig,
    LoraConfig,
    NF4Config,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    quantize_model,
)
from minipeft.bottleneck.layer import BottleneckLayer
from minipeft.lora.layer import LoraLayer

METHODS: dict[str, Any] = {
    "lora": lambda task: LoraConfig(r=4, lora_alpha=16, task_type=task),
    "bottleneck": lambda task: BottleneckConfig.houlsby(bottleneck_size=8, task_type=task),
    "prefix": lambda task: PrefixTuningConfig(num_virtual_tokens=4, task_type=task),
    "prompt": lambda task: PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", task_type=task),
}
# Whose start is the identity; the text sees virtual tokens from the start.
IDENTITIES = ("lora", "bottleneck")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)
every_base = pytest.mark.parametrize("base", ["plain", "nf4"])


def base_model(family: str, base: str) -> Any:
    model = FAMILIES[family].build()
    return quantize_model(model, NF4Config()) if base == "nf4" else model


def adapted(family: str, method: str, base: str = "plain") -> Any:
    return get_peft_model(base_model(family, base), METHODS[method](FAMILIES[family].task_type))


def logits(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**FAMILIES[family].batch()).logits


def loss(model: Any, family: str) -> float:
    with torch.no_grad():
        return model.eval()(**FAMILIES[family].batch()).loss.item()


@functools.cache
def trained(family: str, method: str, base: str) -> tuple[Any, list[float]]:
    """A model after a few steps, and its loss before and after. Tests leave it as they found it."""
    model = adapted(family, method, base)
    losses = [loss(model, family)]
    model.train()
    torch.manual_seed(1)
    # A prefix starts at numbers of size 1, a prompt at embeddings, as large as the family has them.
    lr = 2e-2 if method in IDENTITIES else 0.1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(6):
        model(**FAMILIES[family].batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, [*losses, loss(model, family)]


@functools.cache
def base_logits(family: str, base: str) -> torch.Tensor:
    return logits(base_model(family, base), family)


@every_base
@pytest.mark.parametrize("method", IDENTITIES)
@every_family
def test_the_start_is_the_identity(family: str, method: str, base: str) -> None:
    assert torch.equal(logits(adapted(family, method, base), family), base_logits(family, base))


@every_base
@every_method
@every_family
def test_training_lowers_the_loss_and_leaves_the_base_bit_identical(family: str, method: str, base: str) -> None:
    model, losses = trained(family, method, base)
    assert losses[-1] < losses[0] - 0.05
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base_model(family, base).state_dict().items())


@every_base
@every_method
@every_family
def test_a_disabled_adapter_leaves_the_base_model(family: str, method: str, base: str) -> None:
    model, _ = trained(family, method, base)
    assert not torch.allclose(logits(model, family), base_logits(family, base), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base_logits(family, base))


@every_base
@every_method
@every_family
def test_a_saved_adapter_gives_the_same_output_when_loaded(family: str, method: str, base: str, tmp_path: Any) -> None:
    model, _ = trained(family, method, base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(family, base), tmp_path)
    assert torch.equal(logits(again, family), logits(model, family))


@every_base
@every_family
def test_merged_lora_gives_the_same_output(family: str, base: str) -> None:
    model, _ = trained(family, "lora", base)
    before = logits(model, family)
    model.merge_adapter(safe_merge=True)
    merged = logits(model, family)
    model.unmerge_adapter()
    torch.testing.assert_close(merged, before, rtol=0, atol=2e-5)
    assert torch.equal(logits(model, family), before)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
@every_family
def test_what_cannot_be_merged_says_so(family: str, method: str) -> None:
    model, _ = trained(family, method, "plain")
    with pytest.raises(
        ValueError, match=rf"'default' cannot be merged: (?i:{method})\w* changes more than the weights"
    ):
        model.merge_adapter()


@every_method
@every_family
def test_gradient_checkpointing_gives_the_same_gradients(family: str, method: str) -> None:
    model = adapted(family, method, "nf4").train()
    randomize(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout
        model(**FAMILIES[family].batch(), use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for with_, without in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(with_, without)


@every_family
def test_parallel_adapters_start_as_the_identity_and_learn(family: str) -> None:
    config = BottleneckConfig.parallel(bottleneck_size=8, mh_adapter=True, task_type=FAMILIES[family].task_type)
    model = get_peft_model(base_model(family, "plain"), config)
    assert torch.equal(logits(model, family), base_logits(family, "plain"))
    model(**FAMILIES[family].batch()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("up.weight"))
    randomize(model)
    assert not torch.allclose(logits(model, family), base_logits(family, "plain"), atol=1e-3)


# Dynamo's own doings.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_method
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "BERT classifier"])
def test_compiled_model_gives_the_same_loss_and_gradients(family: str, method: str) -> None:
    model = FAMILIES[family].build(layers=1)
    if family == "Llama":  # where the adapter's dtype is not the model's
        model = model.bfloat16()
    model = get_peft_model(model, METHODS[method](FAMILIES[family].task_type))
    randomize(model)

    def run(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = forward(**FAMILIES[family].batch()).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    eager = run(model)
    torch.compiler.reset()
    for compiled, plain in zip(run(torch.compile(model, backend="aot_eager")), eager, strict=True):
        torch.testing.assert_close(compiled, plain)


@every_family
def test_default_lora_targets_are_those_that_peft_takes(family: str) -> None:
    ours = adapted_modules(adapted(family, "lora"))
    assert ours
    # PEFT has no defaults for some, and makes no adapter from its own for Mixtral.
    if FAMILIES[family].model_type not in PEFT_TARGETS or family == "Mixtral":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft announces what it does with Conv1D
        theirs = peft.get_peft_model(base_model(family, "plain"), peft.LoraConfig())
    layers = (n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    assert ours == {name.removeprefix("base_model.model.") for name in layers}


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_parameters_of_experts_are_no_modules_and_the_router_can_be_taken_alone(family: str) -> None:
    with pytest.raises(
        ValueError, match=r"experts.gate_up_proj is one parameter \(4, .*\) of all the experts, not a mod"
    ):
        get_peft_model(base_model(family, "plain"), LoraConfig(target_modules=["q_proj", "experts.gate_up_proj"]))
    router_alone = get_peft_model(base_model(family, "plain"), LoraConfig(target_modules=["gate"]))
    trained = [name for name, p in router_alone.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(".mlp.gate." in name for name in trained)


@pytest.mark.parametrize("method", IDENTITIES)
@pytest.mark.parametrize("relative", RELATIVES)
def test_relatives_of_the_families_work_as_they_do(relative: str, method: str, tmp_path: Any) -> None:
    family = RELATIVES[relative]
    with torch.no_grad():
        plain = family.build()(**family.batch()).logits
    model = get_peft_model(family.build(), METHODS[method](family.task_type))
    outputs = model(**family.batch())
    assert torch.equal(outputs.logits, plain)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**family.batch()).logits, model(**family.batch()).logits)


def test_gemma_3_with_images_is_adapted_in_its_language_model() -> None:
    ids = some_ids()
    plain = tiny_gemma3_with_images()(ids).logits
    model = get_peft_model(tiny_gemma3_with_images(), BottleneckConfig.houlsby(bottleneck_size=8))
    assert torch.equal(model(ids).logits, plain)
    parts = [f"model.language_model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")]
    assert adapted_modules(model) == set(parts)
    lora = adapted_modules(get_peft_model(tiny_gemma3_with_images(), LoraConfig()))
    assert {name.split(".")[1] for name in lora} == {"language_model", "vision_tower"}


# The table in the documentation


def adapted_modules(model: Any) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, LoraLayer | BottleneckLayer)}


def endings(paths: set[str]) -> str:
    """Module names without what stands before the last layer number, sorted: "self_attn.q_proj, self_attn.v_proj"."""
    return ", ".join(sorted({re.sub(r"^.*\.\d+\.", "", path) for path in paths}))


def row_of(family: str) -> list[str]:
    """What the table must say of `family`, found out by asking."""

    def targets(config: Any) -> str:
        try:
            return endings(adapted_modules(get_peft_model(base_model(family, "plain"), config)))
        except ValueError:
            return "raises"

    dense = [n for n, m in base_model(family, "nf4").named_modules() if isinstance(m, torch.nn.Linear)]
    experts = [n for n, p in base_model(family, "nf4").named_parameters() if p.dim() == 3]
    return [
        family,
        targets(LoraConfig()),
        targets(BottleneckConfig(mh_adapter=True, output_adapter=False)),
        targets(BottleneckConfig.pfeiffer()),
        targets(BottleneckConfig.parallel()),
        endings({*dense, *experts}),
    ]


def test_the_table_of_families_says_what_is() -> None:
    text = (Path(__file__).parent.parent / "docs" / "families.md").read_text().split("\n## ")[0]
    lines = [line for line in text.splitlines() if "| `" in line]
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    assert rows == [row_of(family) for family in FAMILIES]

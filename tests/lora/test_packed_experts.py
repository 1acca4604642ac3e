"""LoRA over experts in 4 bits: the dequantized model with the same adapter is the oracle."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, OTHERS

from minipeft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from minipeft.errors import PeftWarning
from minipeft.experts import packed
from minipeft.nf4.experts import NF4Experts
from minipeft.nf4.hf import NF4Config, quantize_model

MIXTURES = {
    **{name: FAMILIES[name] for name in ("Mixtral", "Qwen3-MoE")},
    "gpt_oss": OTHERS["gpt_oss"],
}
every_mixture = pytest.mark.parametrize("family", MIXTURES)


def adapted(model: Any, **options: Any) -> Any:
    """`model` with LoRA on its experts and its attention; A and B are random."""
    config = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"], **options}
    model = get_peft_model(model, LoraConfig(**config)).eval()
    randomize(model)
    return model


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def logits_of(model: Any, family: str) -> torch.Tensor:
    return model(**MIXTURES[family].batch()).logits


def run(model: Any, family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**MIXTURES[family].batch())
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dequantized(family: str) -> Any:
    return quantize_model(MIXTURES[family].build()).dequantize()


@every_mixture
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_acts_and_learns_as_over_the_dequantized_experts(family: str, dropout: float) -> None:
    results = []
    for model in (quantize_model(MIXTURES[family].build()), dequantized(family)):
        model = adapted(model, lora_dropout=dropout).train(bool(dropout))
        torch.manual_seed(0)
        results.append(run(model, family))
    (logits, gradients), (wanted, wanted_gradients) = results
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys() and any("experts" in name for name in gradients)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


@every_mixture
def test_files_merging_and_going_back(family: str, tmp_path: Path) -> None:
    base = quantize_model(MIXTURES[family].build())
    model = adapted(copy.deepcopy(base))
    logits, _ = run(model, family)
    model.save_pretrained(tmp_path)
    # The file serves a dense model too, and what it wrote serves a packed one.
    for other in (copy.deepcopy(base), dequantized(family)):
        again = PeftModel.from_pretrained(other, tmp_path)
        torch.testing.assert_close(logits_of(again, family), logits, rtol=1e-4, atol=1e-5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, family), logits, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    with model.disable_adapter():
        assert torch.equal(logits_of(model, family), logits_of(base, family))
    plain = copy.deepcopy(model).unload()
    assert list(plain.state_dict()) == list(base.state_dict()) and type(plain) is type(base)

    merged = copy.deepcopy(model).merge_and_unload()
    dense = MIXTURES[family].build()
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in dense.named_modules()}
    assert list(merged.state_dict()) == list(dense.state_dict())
    torch.testing.assert_close(logits_of(merged, family), logits, rtol=1e-4, atol=1e-5)
    wanted = adapted(dequantized(family)).merge_and_unload()
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)

    requantized = model.merge_and_unload(requantize=True)
    experts = {n: m for n, m in requantized.named_modules() if isinstance(m, NF4Experts)}
    assert len(experts) == 2 and all(packed(m, "down_proj") is not None for m in experts.values())
    from_dense = quantize_model(wanted)
    for name, module in experts.items():
        for weight in ("gate_up_proj", "down_proj"):
            w = from_dense.get_submodule(name).dense_experts(weight)
            # A sum in another order may round a weight to the neighbouring level.
            assert ((module.dense_experts(weight) - w).norm() / w.norm()) < 1e-2


@every_mixture
def test_16_bits_keep_their_dtype_through_merging(family: str) -> None:
    model = adapted(quantize_model(MIXTURES[family].build().bfloat16()))
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert experts.lora_experts["default"]["down_proj"].lora_A.dtype == torch.float32
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_experts_by_the_names_of_layers() -> None:
    model = quantize_model(MIXTURES["Qwen3-MoE"].build())
    plain = get_peft_model(MIXTURES["Qwen3-MoE"].build(), LoraConfig(target_modules="all-linear"))
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    over_packed = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert [name for name, p in over_packed.named_parameters() if p.requires_grad] == names
    assert over_packed.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    assert any("experts" in name for name in names)


def test_several_adapters_and_rows_of_their_own() -> None:
    family = "Mixtral"
    logits = []
    for model in (quantize_model(MIXTURES[family].build()), dequantized(family)):
        model = adapted(model)
        model.add_adapter("other", LoraConfig(r=2, target_parameters=["down_proj"]))
        randomize(model)
        model.eval()
        batch = {k: v for k, v in MIXTURES[family].batch().items() if k != "labels"}
        with torch.no_grad():
            logits.append(model(**batch, adapter_names=["default", "other"]).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_a_packed_router_or_a_missing_name_is_answered() -> None:
    model = quantize_model(MIXTURES["Mixtral"].build())
    with pytest.raises(ValueError, match=r"gate_upproj.*\['down_proj', 'gate_up_proj'\]"):
        get_peft_model(model, LoraConfig(target_parameters=["gate_upproj"]))
    with pytest.raises(ValueError, match=r"experts.gate_up_proj is one parameter \(4, 192, 64\) of all the experts"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "experts.gate_up_proj"]))
    mixed = quantize_model(MIXTURES["Mixtral"].build(), NF4Config(skip_modules=["lm_head", "layers.0.mlp.experts"]))
    mixed = adapted(mixed)
    assert len([m for m in mixed.modules() if isinstance(m, NF4Experts)]) == 1
    run(mixed, "Mixtral")


def test_a_loftq_start_of_the_layers_says_that_the_experts_keep_theirs(tmp_path: Path) -> None:
    MIXTURES["Mixtral"].build().save_pretrained(tmp_path)
    model = get_peft_model(
        quantize_model(MIXTURES["Mixtral"].build()),
        LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["down_proj"]),
    )
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    with pytest.warns(PeftWarning, match=r"2 stacks of packed experts keep their start, such as .*experts.down_proj"):
        replace_lora_weights_loftq(model, tmp_path)
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert changed == {name for name in before if "q_proj" in name}

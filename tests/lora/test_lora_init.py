"""PiSSA: starts from the principal components, is the paper's function, and leaves the base model alone."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomize, some_ids, tiny_gpt2, tiny_llama
from torch import nn

import minipeft
from minipeft import LoraConfig, NF4Config, get_peft_model, quantize_model

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
KINDS = ["pissa", "pissa_niter_4"]


def pissa(kind: str = "pissa", **changes: Any) -> LoraConfig:
    return LoraConfig(**{**CONFIG, "init_lora_weights": kind, **changes})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(some_ids()).logits


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_leading_part_of_the_weight(kind: str) -> None:
    model = get_peft_model(tiny_llama(), pissa(kind))
    layer = model.model.layers[0].mlp.down_proj
    lora_A, lora_B = layer.factors("default")
    left, values, right = torch.linalg.svd(layer.weight.detach())
    best = left[:, :4] @ values[:4].diag() @ right[:4]
    product = 3 * lora_B @ lora_A
    # The randomized method comes close: its error may exceed the best one of this rank by little.
    if kind == "pissa":
        torch.testing.assert_close(product, best, rtol=0, atol=1e-5)
        torch.testing.assert_close(lora_A @ lora_A.T, (values[:4] / 3).diag(), rtol=0, atol=1e-5)
        torch.testing.assert_close(lora_B.T @ lora_B, (values[:4] / 3).diag(), rtol=0, atol=1e-5)
    error = (layer.weight - product).norm()
    assert error <= (layer.weight - best).norm() * 1.01


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_identity(kind: str, changes: dict[str, Any]) -> None:
    for plain in (tiny_llama(), quantize_model(tiny_llama(), NF4Config())):
        before = logits(plain)
        model = get_peft_model(plain, pissa(kind, **changes))
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_forward_and_gradients_are_those_of_the_residual() -> None:
    layer = nn.Linear(10, 7, dtype=torch.float64)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    model = get_peft_model(nn.ModuleDict({"layer": layer}), pissa(target_modules=["layer"]))
    start_A, start_B = (f.detach().clone() for f in model["layer"].factors("default"))
    randomize(model, scale=0.3)
    own = list(model["layer"].factors("default"))
    lora_A, lora_B = (f.detach().clone().requires_grad_() for f in own)
    x = torch.randn(5, 10, dtype=torch.float64)
    residual = weight - 3 * start_B @ start_A
    expected = x @ (residual + 3 * lora_B @ lora_A).T + bias
    torch.testing.assert_close(model["layer"](x), expected)
    wanted = torch.autograd.grad(expected.square().sum(), (lora_A, lora_B))
    for ours, theirs in zip(torch.autograd.grad(model["layer"](x).square().sum(), own), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_spares_the_residual() -> None:
    model = get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(10, 7)}), pissa(target_modules=["layer"], lora_dropout=0.5)
    )
    layer, x = model["layer"], torch.ones(4000, 10)
    clean = layer.eval()(x)
    noisy = layer.train()(x)
    assert not torch.equal(noisy, clean)
    torch.testing.assert_close(noisy.mean(0), clean.mean(0), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("plain", [tiny_llama, tiny_gpt2, lambda: quantize_model(tiny_llama(), NF4Config())])
def test_base_is_never_changed(plain: Any) -> None:
    untouched, model = plain(), plain()
    targets = ["c_attn"] if hasattr(model, "transformer") else ["q_proj"]
    model = get_peft_model(model, pissa(target_modules=targets))
    randomize(model)
    adapted, base = logits(model), logits(untouched)
    assert not torch.allclose(adapted, base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(target_modules=targets))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), base)
    plain_again = model.unload()
    assert all(torch.equal(weights(plain_again)[n], t) for n, t in weights(untouched).items())
    assert plain_again.state_dict().keys() == untouched.state_dict().keys()


def test_acts_beside_other_adapters_and_in_rows() -> None:
    model = get_peft_model(tiny_llama(), pissa())
    model.add_adapter("other", LoraConfig(**CONFIG))
    randomize(model)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64)
    with torch.no_grad():
        plain = nn.functional.linear(x, layer.weight)
        updates = [x @ layer.delta_weight(name).T for name in ("default", "other")]
        model.set_adapter(["default", "other"])
        torch.testing.assert_close(layer(x), plain + sum(updates))
        mixed = model.eval()(some_ids(2), adapter_names=["other", "default"]).logits
        model.set_adapter("default")
        torch.testing.assert_close(mixed[1:], model(some_ids(2)[1:]).logits, rtol=0, atol=1e-5)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", svd_rank=12)
    torch.testing.assert_close(x @ layer.delta_weight("both").T, sum(updates), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="'default' is PiSSA: combination_type 'cat' adds up factors"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "cat", combination_type="cat")


def trained(library: Any, **changes: Any) -> Any:
    model = library.get_peft_model(
        tiny_llama(), library.LoraConfig(**{**CONFIG, "init_lora_weights": "pissa", **changes})
    )
    randomize(model)
    return model


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 6}}])
def test_pissa_adapters_move_between_the_libraries(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = trained(peft, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = minipeft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=0, atol=2e-5)
    ours = trained(minipeft, **changes)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(ours), rtol=0, atol=2e-5)


def test_what_pefts_random_start_was_nobody_knows_so_its_file_is_refused(tmp_path: Path) -> None:
    theirs, model = trained(peft, init_lora_weights="pissa_niter_4"), tiny_llama()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'pissa_niter_4' starts from random numbers that PEFT does not store"):
        minipeft.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("kind", KINDS)
def test_saving_warns_where_peft_would_read_something_else(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(minipeft, init_lora_weights=kind)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion="start")
    assert not caplog.records
    model.save_pretrained(tmp_path / "own")
    assert [kind in record.getMessage() for record in caplog.records] == [True] * (kind != "pissa")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_here_is_exact(kind: str, tmp_path: Path) -> None:
    model = trained(minipeft, init_lora_weights=kind)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(minipeft.PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 5}},
        {"init_lora_weights": "pissa_niter_2"},
    ],
)
def test_conversion_writes_plain_lora_of_twice_the_rank(changes: dict[str, Any], tmp_path: Path) -> None:
    model = trained(minipeft, **changes)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "start")
    config = minipeft.PeftConfig.from_pretrained(tmp_path)
    assert config.r == 8 and config.init_lora_weights is True  # type: ignore[attr-defined]
    for library in (minipeft, peft):
        again = library.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=2e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is for linear layers, 'model\.embed_tokens' is not one"):
        get_peft_model(tiny_llama(), pissa(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"r is 65, but the weight .* has no such rank"):
        get_peft_model(tiny_llama(), pissa(r=65))
    model = get_peft_model(tiny_llama(), LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion makes PiSSA adapters plain"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="start")
    trained(minipeft).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa', expected True"):
        model.load_adapter(tmp_path, "default")

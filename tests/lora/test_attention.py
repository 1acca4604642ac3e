"""LoRA on nn.MultiheadAttention: PEFT's numbers and files, fused operations, merging, what is refused."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import randomize
from torch import nn

import minipeft
from minipeft.errors import PeftWarning


class Attention(nn.Module):
    """Self-attention, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(8, 2, **settings).to(dtype)
        self.head = nn.Linear(8, 3).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.mha(x, x, x)[0])
        return out


SETTINGS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
]
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


def adapted(library: Any = minipeft, dtype: torch.dtype = torch.float32, settings: Any = None, **config: Any) -> Any:
    chosen = {"target_modules": ["mha"], "r": 2, "lora_alpha": 3, **config}
    model = library.get_peft_model(Attention(dtype, **(settings or {})), library.LoraConfig(**chosen))
    randomize(model, scale=0.3)
    return model.eval()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_numbers_and_files_are_those_of_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = adapted(peft, settings=settings, bias="lora_only")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = minipeft.PeftModel.from_pretrained(Attention(**settings), tmp_path / "theirs", is_trainable=True).eval()
    with torch.no_grad():
        expected = theirs(X)
        torch.testing.assert_close(ours(X), expected)
        torch.testing.assert_close(ours.mha.get_delta_weight("default"), theirs.mha.get_delta_weight("default"))
    torch.testing.assert_close(ours(X), expected)
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Attention(**settings), tmp_path / "ours").eval()
    torch.testing.assert_close(ours(X), again(X))
    torch.testing.assert_close(ours.merge_and_unload()(X), again.merge_and_unload()(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_it_computes_the_same_and_unmerged_it_has_its_bits_again(dtype: torch.dtype) -> None:
    model, plain = adapted(dtype=dtype), Attention(dtype)
    x = X.to(dtype)
    names = [*model.state_dict()]
    before = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    model.merge_adapter(safe_merge=True)
    assert torch.equal(model(x), before)
    model.unmerge_adapter()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert [*model.state_dict()] == names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), before)
    merged = model.merge_and_unload()
    assert type(merged.mha) is nn.MultiheadAttention and torch.equal(merged(x), before)
    assert type(merged.mha.out_proj) is type(plain.mha.out_proj)


def test_gradients_are_those_of_the_merged_weights() -> None:
    model, weights = adapted(dtype=torch.float64), Attention(torch.float64)
    layers = {"in_proj_weight": (model.mha, 1), "out_proj.weight": (model.mha.out_proj, 2)}
    factors = {name: layer.factors("default") for name, (layer, _) in layers.items()}
    new = {
        f"mha.{name}": weights.mha.get_parameter(name) + times * 1.5 * factors[name][1] @ factors[name][0]
        for name, (_, times) in layers.items()
    }
    expected = torch.func.functional_call(weights, new, (X.double(),))
    own = [factor for pair in factors.values() for factor in pair]
    wanted = torch.autograd.grad(expected.square().sum(), own)
    out = model(X.double())
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.square().sum(), own), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["self_attn"]},
        {"target_modules": ["linear1"], "use_dora": True},
        {"target_modules": ["linear2"], "bias": "all"},
        {"target_modules": ["linear2"], "modules_to_save": ["norm1"]},
    ],
    ids=str,
)
def test_a_fused_encoder_does_not_pass_the_adapter_by(layers: int, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = minipeft.get_peft_model(nn.TransformerEncoder(layer, layers), minipeft.LoraConfig(r=2, **config))
    plain = copy.deepcopy(model).unload().eval()
    randomize(model, scale=0.5)
    slow = model.eval()(X)
    assert slow.grad_fn is not None and not torch.allclose(slow, plain(X), atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(X), slow, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(X), plain(X))
        model.merge_adapter()
        torch.testing.assert_close(model(X), slow, atol=1e-5, rtol=1e-5)


def test_several_adapters_are_switched_added_and_deleted() -> None:
    model = adapted()
    first = model(X)
    model.add_adapter("other", minipeft.LoraConfig(target_modules=["mha"], r=4, init_lora_weights=False))
    model.set_adapter("other")
    second = model(X)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter(["default", "other"])
    both = model(X)
    model.set_adapter("sum")
    torch.testing.assert_close(model(X), both)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(X), first) and not torch.allclose(first, second)
    assert not any(".other" in name for name in model.state_dict())


def test_what_attention_cannot_have_is_refused() -> None:
    def attach(settings: Any = None, **config: Any) -> Any:
        chosen = minipeft.LoraConfig(**{"target_modules": ["mha"], **config})
        return minipeft.get_peft_model(Attention(**(settings or {})), chosen)

    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        attach({"kdim": 4, "vdim": 6})
    with pytest.raises(ValueError, match=r"does not support DoRA \(yet\)"):
        attach(use_dora=True)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for MultiheadAttention"):
        attach(lora_bias=True)
    with pytest.raises(ValueError, match=r"'mha\.out_proj' is read by its nn.MultiheadAttention.*take 'mha'"):
        attach(target_modules=["out_proj"])
    with pytest.warns(PeftWarning, match="lora_dropout does not act on nn.MultiheadAttention"):
        attach(lora_dropout=0.1)
    assert attach(target_modules="all-linear").peft_config["default"].target_modules == {"head"}
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        adapted()(X, adapter_names=["default", "__base__", "default", "default"])


class Pooled(nn.Module):
    """As SigLIP's: attention's own out-projection has the name of an ordinary layer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out_proj = nn.Linear(8, 8)
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out_proj(x)
        return self.pool(x, x, x)[0]


@pytest.mark.filterwarnings("ignore::minipeft.errors.PeftWarning")
def test_an_out_projection_of_a_common_name_has_factors_that_never_act(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8)
    settings: dict[str, Any] = {"r": 2, "target_modules": ["out_proj"], "init_lora_weights": False}
    with pytest.warns(PeftWarning, match=r"\['pool\.out_proj'\] are read by their nn.MultiheadAttention"):
        minipeft.get_peft_model(Pooled(), minipeft.LoraConfig(**settings))
    theirs = peft.get_peft_model(Pooled(), peft.LoraConfig(**settings))
    theirs.save_pretrained(tmp_path / "theirs")
    model = minipeft.PeftModel.from_pretrained(Pooled(), tmp_path / "theirs")
    torch.testing.assert_close(model(x), theirs(x))
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Pooled(), tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs(x))
    torch.testing.assert_close(model.merge_and_unload()(x), theirs(x))
    only = minipeft.LoraConfig(**settings, exclude_modules=["pool.out_proj"])
    assert not hasattr(minipeft.get_peft_model(Pooled(), only).pool.out_proj, "lora_A")


def test_another_adapter_is_swapped_in(tmp_path: Path) -> None:
    small = adapted(target_modules=["mha", "head"])
    small.save_pretrained(tmp_path)
    model = adapted(target_modules=["mha", "head"], r=4, lora_alpha=5)
    minipeft.hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(X), small(X))

"""quantize_model: a model that is in memory already."""

import weakref

import pytest
import torch
from hf_helpers import logits, nf4_names, saved, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from minipeft import LoraConfig, get_peft_model
from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft.nf4.hf import NF4Config, quantize_model

load = AutoModelForCausalLM.from_pretrained


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config", [NF4Config(), NF4Config(128, False, torch.float32, ["q_proj", "c_proj"])], ids=["default", "other"]
)
def test_state_is_that_of_from_pretrained(tmp_path, kind, config):
    loaded = load(saved(tiny(kind), tmp_path), quantization_config=config)
    model = tiny(kind)
    assert quantize_model(model, config) is model
    states = [m.state_dict() for m in (model, loaded)]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(logits(model), logits(loaded))
    for attribute in ("is_quantized", "quantization_method"):
        assert getattr(model, attribute) == getattr(loaded, attribute)
    assert vars(model.config.quantization_config) == vars(loaded.config.quantization_config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_and_reloaded_logits_are_bit_equal(tmp_path, kind):
    model = quantize_model(tiny(kind))
    again = load(saved(model, tmp_path / "packed"))
    assert torch.equal(logits(again), logits(model))
    assert nf4_names(model.dequantize()) == []


def test_a_layer_with_adapters_is_not_dequantized_without_them():
    model = get_peft_model(quantize_model(tiny("llama")), LoraConfig(r=4, target_modules=["q_proj"]))
    before = len(nf4_names(model))
    with pytest.raises(ValueError, match=r"q_proj has adapters \['default'\].*merge_and_unload"):
        model.dequantize()
    assert len(nf4_names(model)) == before
    assert nf4_names(model.unload().dequantize()) == []


def test_tied_head_stays_dense():
    model = quantize_model(tiny(tie_word_embeddings=True), NF4Config(skip_modules=[]))
    assert isinstance(model.lm_head, nn.Linear) and model.lm_head.weight is model.model.embed_tokens.weight
    assert len(nf4_names(model)) == 14


class Plain(nn.Module):
    """Shares a weight between two layers and a whole layer between two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.first.weight
        self.inner = nn.Sequential(self.second, nn.Linear(32, 64))
        self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64)

    def forward(self, x):
        return self.inner(self.special(self.tied(self.first(x)))), self.second(x)


def test_plain_module():
    torch.manual_seed(0)
    model = Plain().eval()
    x = torch.randn(3, 64)
    weight = NF4Weight.quantize(model.second.weight)
    model = quantize_model(model)
    assert nf4_names(model) == ["second", "inner.1"]
    # the shared layer is one layer still
    assert model.inner[0] is model.second and not model.second.training
    assert torch.equal(model.second.weight, weight.codes)
    # shared weights and subclasses stay
    assert isinstance(model.first, nn.Linear) and model.tied.weight is model.first.weight
    torch.testing.assert_close(model(x)[1], x @ weight.dequantize().T)


def test_skip_modules_of_a_plain_module():
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), NF4Config(skip_modules=["1"]))
    assert isinstance(model[0], NF4Linear) and isinstance(model[1], nn.Linear)


def test_dense_weights_are_freed_one_by_one(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5)))
    alive = [weakref.ref(layer.weight) for layer in model]
    left = []
    quantize = NF4Weight.quantize.__func__

    def counting(cls, *args, **options):
        left.append(sum(weight() is not None for weight in alive))
        return quantize(cls, *args, **options)

    monkeypatch.setattr(NF4Weight, "quantize", classmethod(counting))
    quantize_model(model)
    assert left == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_refused_by_name_and_nothing_is_changed(bad):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight holds NaN or infinity"):
        quantize_model(model)
    assert nf4_names(model) == [] and not getattr(model, "is_quantized", False)


def test_what_cannot_be_quantized_is_refused():
    model = quantize_model(tiny())
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantized already"):
        quantize_model(model)
    with pytest.raises(ValueError, match="Sequential is quantized already"):
        quantize_model(nn.Sequential(nn.Linear(64, 64), NF4Linear(64, 64)))
    with pytest.raises(ValueError, match="Sequential has nothing to put into NF4"):
        quantize_model(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"NF4Linear.from_linear"):
        quantize_model(nn.Linear(64, 64))
    with pytest.raises(TypeError, match="takes an NF4Config, not dict"):
        quantize_model(nn.Sequential(nn.Linear(64, 64)), {"blocksize": 64})
    with pytest.raises(TypeError, match=r"0.weight is torch.float64"):
        quantize_model(nn.Sequential(nn.Linear(64, 64, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"0.weight is on the meta device"):
        quantize_model(nn.Sequential(nn.Linear(64, 64, device="meta")))


def test_model_spread_over_devices_is_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0]._hf_hook = object()
    with pytest.raises(ValueError, match="0 is spread over devices"):
        quantize_model(model)


def test_model_with_adapters_is_refused():
    model = tiny()
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="has adapters"):
        quantize_model(model)


def test_biases_and_modes_are_kept():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).train()
    model[0].eval()
    bias = model[0].bias
    quantize_model(model)
    assert model[0].bias is bias and not model[0].training and model[1].training

"""Where bottleneck adapters go, what their configuration refuses, and how they lie on disk."""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import randomize, some_ids, tiny_llama
from tiny_families import FAMILIES
from torch import nn

from minipeft import BottleneckConfig, PeftConfig, PeftModel, get_peft_model
from minipeft.bottleneck.layer import BottleneckLayer

OPTIONS: dict[str, dict[str, Any]] = {
    "size": {"bottleneck_size": 5, "non_linearity": "tanh", "dropout": 0.1},
    "learned": {"scaling": "learned", "layer_norm": True},
    "houlsby": {"mh_adapter": True, "non_linearity": "swish", "scaling": 0.5},
    "parallel": {"mh_adapter": True, "is_parallel": True},
    "regex": {"target_modules": r".*\.1\.(mlp|self_attn)"},
    "layers": {"layers_to_transform": [1], "exclude_modules": ["0.mlp"], "modules_to_save": ["lm_head"]},
}


class Part(nn.Module):
    """A part whose width nothing tells."""

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.inner, self.result = nn.Linear(10, 10), result

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) if self.result is None else self.result


def places(model: nn.Module, config: BottleneckConfig) -> list[str]:
    model = get_peft_model(model, copy.deepcopy(config))
    return [n for n, m in model.named_modules() if isinstance(m, BottleneckLayer)]


def test_presets_are_the_papers() -> None:
    houlsby, pfeiffer, parallel = BottleneckConfig.houlsby(), BottleneckConfig.pfeiffer(), BottleneckConfig.parallel()
    layer = "model.layers.{}.{}".format
    both = [layer(i, part) for i in (0, 1) for part in ("self_attn", "mlp")]
    assert places(tiny_llama(), houlsby) == both and houlsby.size_for(768) == 48
    assert places(tiny_llama(), pfeiffer) == places(tiny_llama(), BottleneckConfig()) == both[1::2]
    assert pfeiffer == BottleneckConfig()
    assert places(tiny_llama(), parallel) == both[1::2] and parallel.is_parallel
    assert (parallel.scaling, parallel.size_for(768), parallel.init_weights) == (4.0, 384, "mam_adapter")
    small = BottleneckConfig.houlsby(bottleneck_size=5, non_linearity="tanh")
    assert (small.size_for(768), small.non_linearity, small.mh_adapter) == (5, "tanh", True)
    assert BottleneckConfig(reduction_factor=0.5).size_for(8) == 16 and BottleneckConfig().size_for(8) == 1


def test_cross_attention_gets_adapters_where_there_is_some() -> None:
    found = places(FAMILIES["T5"].build(), BottleneckConfig(cross_adapter=True, output_adapter=False))
    assert found == [f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)]
    with pytest.raises(ValueError, match="cross_adapter=True: no cross-attention is known in a model of type 'llama'"):
        places(tiny_llama(), BottleneckConfig(cross_adapter=True))


def test_t5_layers_are_counted_in_blocks() -> None:
    found = places(FAMILIES["T5"].build(), BottleneckConfig.houlsby(layers_to_transform=[1]))
    parts = ["0.SelfAttention", "1.DenseReluDense", "0.SelfAttention", "2.DenseReluDense"]
    stacks = ["encoder", "encoder", "decoder", "decoder"]
    assert found == [f"{stack}.block.1.layer.{part}" for stack, part in zip(stacks, parts, strict=True)]


def test_bert_adapters_stand_apart_by_their_whole_names() -> None:
    layer = "bert.encoder.layer.{}.{}output.dense".format
    found = places(FAMILIES["BERT classifier"].build(), BottleneckConfig())
    assert found == [layer(0, ""), layer(1, "")]
    found = places(FAMILIES["BERT classifier"].build(), BottleneckConfig.houlsby(layers_to_transform=[1]))
    assert found == [layer(1, "attention."), layer(1, "")]


def test_modules_can_be_named_and_taken_out() -> None:
    config = BottleneckConfig(target_modules=["self_attn", "down_proj"], exclude_modules=["0.self_attn"])
    assert places(tiny_llama(), config) == [
        *("model.layers.0.mlp.down_proj", "model.layers.1.self_attn", "model.layers.1.mlp.down_proj"),
    ]
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(net, BottleneckConfig(target_modules=["0"], bottleneck_size=2))
    assert model[0].bottleneck["default"].down.weight.shape == (2, 8)


@pytest.mark.parametrize(
    ("build", "config", "complaint"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, r"no usual places .* type None: name the modules .* are \['0'\]"),
        (tiny_llama, {"target_modules": ["mpl"]}, r"'mpl' matches no module .*; the nearest names are mlp"),
        (tiny_llama, {"target_modules": ["layers"]}, r"'model.layers' is a .*ModuleList, which no adapter can stand"),
        (tiny_llama, {"target_modules": ["act_fn"]}, r"act_fn' is a .*, which no adapter can stand after"),
        (tiny_llama, {"target_modules": ["embed_tokens"]}, r"embed_tokens' is a .*, which no adapter can stand after"),
        (lambda: nn.Sequential(Part()), {"target_modules": ["0"]}, r"'0' is a .*Part; give hidden_size"),
    ],
)
def test_targets_that_cannot_be_raise(build: Any, config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        get_peft_model(build(), BottleneckConfig(**config))


def test_a_part_that_cannot_be_followed_or_read_says_so() -> None:
    config = {"target_modules": ["0"], "hidden_size": 10}
    model = get_peft_model(nn.Sequential(Part(result={"a": 1})), BottleneckConfig(**config))
    with pytest.raises(TypeError, match="an adapter cannot stand after BottleneckPart, which returns dict"):
        model(torch.ones(1, 10))
    model = get_peft_model(nn.Sequential(Part()), BottleneckConfig(**config, is_parallel=True))
    assert model(torch.ones(1, 10)).shape == (1, 10)
    with pytest.raises(TypeError, match=r"a parallel adapter reads .* first argument or hidden_states, got \['x'\]"):
        model[0](x=torch.ones(1, 10))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size must be a positive integer, got 0"),
        ({"bottleneck_size": 4, "reduction_factor": 2}, r"bottleneck_size \(4\) or reduction_factor \(2\), not both"),
        ({"reduction_factor": {"1": 0}}, r"reduction_factor must be a number greater than 0, got 0"),
        ({"reduction_factor": {"one": 2}}, r"reduction_factor: 'one' is no layer's number, nor 'default'"),
        ({"leave_out": 3}, "leave_out must be a list of layer numbers, got 3"),
        ({"residual_before_ln": "post_add"}, r"has no such placement of an adapter; it has \(False, True, True\), "),
        ({"original_ln_after": False}, "original_ln_after=False: minipeft has no such placement"),
        ({"original_ln_before": True, "is_parallel": True}, "original_ln_before=True is for adapters after a part"),
        ({"parallel_reads": {"fc2": "fc1"}}, "parallel_reads says what a network with is_parallel=True reads"),
        ({"sum_norm": "norm"}, "sum_norm says what original_ln_before=True normalizes again"),
        ({"inv_adapter": "glow"}, "inv_adapter must be 'nice', got 'glow'"),
        ({"inv_adapter_reduction_factor": 2}, "inv_adapter_reduction_factor is of inv_adapter, which is not given"),
        ({"non_linearity": "rleu"}, "non_linearity must be one of relu, .*, got 'rleu'"),
        ({"scaling": "row"}, "scaling must be a number, 'learned' or 'channel', got 'row'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"init_weights": "zeros"}, "init_weights must be one of mam_adapter, bert, houlsby, got 'zeros'"),
        ({"output_adapter": False}, "no place is left"),
        ({"target_modules": "all-linear"}, "'all-linear' is LoRA's"),
        ({"target_modules": "(mlp"}, r"target_modules '\(mlp' is not a regular expression"),
        ({"target_modules": 3}, "target_modules must be a list of names or a regular expression, got 3"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
        ({"mh_adapter": 3}, "mh_adapter must be true or false, got 3"),
        ({"ln_before": "yes"}, "ln_before must be true or false, got 'yes'"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a layer number or a list of them, got '1'"),
        ({"layers_pattern": "layers"}, "layers_to_transform, which is not given"),
        *[
            ({field: value}, rf"BottleneckConfig\({field}={value!r}\) is not supported".replace("[", r"\["))
            for field, value in {
                **{"adapter_residual_before_ln": True, "use_gating": True, "phm_layer": True},
                **{"stochastic_depth": 0.1, "init_weights_seed": 3},
            }.items()
        ],
    ],
)
def test_what_a_config_cannot_mean_is_refused_by_name(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BottleneckConfig(**config)


def test_both_names_of_the_layer_norm_mean_it() -> None:
    assert BottleneckConfig(ln_before=True) == BottleneckConfig(layer_norm=True) != BottleneckConfig()


# On disk


@pytest.mark.parametrize("case", OPTIONS)
def test_a_saved_adapter_loads_with_the_same_options(case: str, tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(), BottleneckConfig(**OPTIONS[case]))
    randomize(model, scale=0.2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)
    ours, theirs = again.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    assert {**ours, "inference_mode": None, "peft_version": None} == {
        **theirs,
        **dict.fromkeys(("inference_mode", "peft_version")),
        "auto_mapping": ours["auto_mapping"],
    }


def test_names_on_disk(tmp_path: Any) -> None:
    config = BottleneckConfig(layer_norm=True, scaling="learned", layers_to_transform=[1], bottleneck_size=4)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.1.mlp.adapter_"
    assert shapes == {
        f"{prefix}down.weight": (4, 64),
        f"{prefix}down.bias": (4,),
        f"{prefix}up.weight": (64, 4),
        f"{prefix}up.bias": (64,),
        f"{prefix}norm.weight": (64,),
        f"{prefix}norm.bias": (64,),
        f"{prefix}scaling": (1,),
    }
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "BOTTLENECK" and values["target_modules"] == ["mlp"]
    assert isinstance(PeftConfig.from_pretrained(tmp_path), BottleneckConfig)


def test_loading_is_strict(tmp_path: Any) -> None:
    get_peft_model(tiny_llama(), BottleneckConfig(bottleneck_size=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2\.mlp\.adapter_down\.weight"):
        PeftModel.from_pretrained(tiny_llama(num_hidden_layers=3), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_down\.weight has shape \(4, 64\), expected \(8, 64\)"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=BottleneckConfig(bottleneck_size=8))
    with pytest.raises(ValueError, match=r"missing tensors .*adapter_norm\.weight"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, config=BottleneckConfig(bottleneck_size=4, layer_norm=True))

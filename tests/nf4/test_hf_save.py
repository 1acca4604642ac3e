"""A 4-bit model saved, read again, and damaged in between."""

import json

import pytest
import torch
from hf_helpers import LLAMA, edit_config, edit_tensors, logits, nf4_names, saved, tiny
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from minipeft.nf4 import NF4Linear
from minipeft.nf4.hf import NF4Config, quantize_model

load = AutoModelForCausalLM.from_pretrained


def packed(tmp_path, kind="llama", config=None, **options):
    """A 4-bit model loaded from a dense checkpoint, and the folder it was then saved to."""
    folder = saved(tiny(kind), tmp_path / "dense")
    model = load(folder, quantization_config=config or NF4Config(), **options)
    return model, saved(model, tmp_path / "packed")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reloaded_logits_are_bit_equal(tmp_path, kind, double_quant, dtype):
    model, folder = packed(tmp_path, kind, NF4Config(double_quant=double_quant), dtype=dtype)
    again = load(folder)
    assert again.dtype == dtype and nf4_names(again) == nf4_names(model)
    assert torch.equal(logits(again), logits(model))
    third = load(saved(again, tmp_path / "third"))
    assert torch.equal(logits(third), logits(model))
    with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
        given = load(folder, quantization_config=NF4Config(blocksize=128))
    assert torch.equal(logits(given), logits(model))


def test_settings_come_back_from_the_file(tmp_path):
    config = NF4Config(128, False, torch.bfloat16, ["k_proj", "lm_head"])
    _, folder = packed(tmp_path, config=config)
    again = load(folder)
    assert vars(again.config.quantization_config) == vars(config)
    layer = again.model.layers[0].self_attn.q_proj
    assert (layer.blocksize, layer.compute_dtype) == (128, torch.bfloat16)
    assert isinstance(again.model.layers[0].self_attn.k_proj, nn.Linear)
    on_disk = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert on_disk["quant_method"] == "bitsandbytes" and on_disk["llm_int8_skip_modules"] == ["k_proj", "lm_head"]


def test_saving_over_the_folder_it_came_from(tmp_path):
    model, folder = packed(tmp_path)
    again = load(folder)
    saved(again, folder)
    assert torch.equal(logits(again), logits(model)) and torch.equal(logits(load(folder)), logits(model))


def test_sharded_packed_checkpoint(tmp_path):
    model, _ = packed(tmp_path)
    folder = saved(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(folder)), logits(model))


def test_another_dtype_casts_the_dense_parts_and_no_scale(tmp_path):
    model, folder = packed(tmp_path)
    half = load(folder, dtype=torch.float16)
    assert half.lm_head.weight.dtype == half.model.norm.weight.dtype == torch.float16
    name = "model.layers.0.mlp.up_proj"
    assert half.get_submodule(name).nested_absmax.dtype == torch.float32
    dequantized = [m.get_submodule(name).dequantize(torch.float32) for m in (model, half)]
    assert torch.equal(*dequantized)


def test_modules_kept_in_float32_come_back_so(tmp_path):
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    folder = saved(tiny("t5", AutoModelForSeq2SeqLM, **sizes, decoder_start_token_id=0), tmp_path / "dense")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=NF4Config(), dtype=torch.float16)
    again = AutoModelForSeq2SeqLM.from_pretrained(saved(model, tmp_path / "packed"))
    assert again.dtype == torch.float16
    assert again.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


def test_the_base_model_reads_the_checkpoint_of_the_full_one(tmp_path):
    model, folder = packed(tmp_path)
    base = AutoModel.from_pretrained(folder)
    assert len(nf4_names(base)) == len(nf4_names(model))
    assert torch.equal(base.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("from_disk", [True, False], ids=["loaded", "in memory"])
def test_weights_that_loading_splits_are_saved_whole(tmp_path, from_disk):
    # ModernBERT's checkpoints hold one Wqkv, which transformers cuts into three modules: packed bytes cannot be
    sizes = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "attention_bias")}
    tokens = {f"{name}_token_id": 0 for name in ("pad", "cls", "sep", "bos", "eos")}
    model = tiny("modernbert", AutoModelForMaskedLM, **sizes, **tokens)
    if from_disk:
        folder = saved(model, tmp_path / "dense")
        model = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=NF4Config())
    else:
        model = quantize_model(model, NF4Config())
    again = AutoModelForMaskedLM.from_pretrained(saved(model, tmp_path / "packed"))
    assert torch.equal(logits(again), logits(model))
    third = AutoModelForMaskedLM.from_pretrained(saved(again, tmp_path / "third"))
    assert torch.equal(logits(third), logits(model))


def test_the_file_holds_bitsandbytes_names(tmp_path):
    _, folder = packed(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    parts = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state.bitsandbytes__nf4")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = file.keys()
        assert {key for key in names if key.startswith(name)} == {name, *(f"{name}.{p}" for p in parts)}
        assert file.get_tensor(name).shape == (128 * 64 // 2, 1)


NAME = "model.layers.1.mlp.up_proj.weight"
PARTS = ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", ".quant_state.bitsandbytes__nf4"]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_tensor_is_refused_by_name(tmp_path, part):
    _, folder = packed(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop(NAME + part))
    with pytest.raises(ValueError, match=f"{NAME}: .*{('weight' + part).replace('.', '[.]')}") as caught:
        load(folder)
    assert "layers.0" not in str(caught.value)


def test_a_weight_with_no_tensor_at_all_is_refused_by_name(tmp_path):
    _, folder = packed(tmp_path)
    edit_tensors(folder, lambda tensors: [tensors.pop(NAME + part) for part in PARTS])
    with pytest.raises(ValueError, match=f"{NAME}: it is not in the checkpoint"):
        load(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_size_is_refused_by_name(tmp_path, part):
    _, folder = packed(tmp_path)

    def halve(tensors):
        tensors[NAME + part] = tensors[NAME + part][: len(tensors[NAME + part]) // 2].clone()

    edit_tensors(folder, halve)
    with pytest.raises(ValueError, match=f"{NAME}: .*{('weight' + part).replace('.', '[.]')}"):
        load(folder)


@pytest.mark.parametrize("part", [".absmax", ".nested_absmax", ".quant_map"])
def test_a_scale_that_is_not_finite_is_refused_by_name(tmp_path, part):
    _, folder = packed(tmp_path, config=NF4Config(double_quant=part != ".absmax"))
    edit_tensors(folder, lambda tensors: tensors[NAME + part][-1:].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"{NAME}: weight{part} holds NaN"):
        load(folder)


def test_packed_weight_of_another_shape_is_refused(tmp_path):
    _, folder = packed(tmp_path)
    other = NAME.replace("up_proj", "down_proj")

    def swap(tensors):
        for part in PARTS:
            tensors[NAME + part] = tensors[other + part].clone()

    edit_tensors(folder, swap)
    with pytest.raises(ValueError, match=rf"{NAME}: the packed weight is \(64, 128\), the module expects \(128, 64\)"):
        load(folder)


def test_dense_weight_where_the_config_says_packed_is_refused(tmp_path):
    _, folder = packed(tmp_path)
    edit_tensors(folder, lambda tensors: [tensors.pop(NAME + part) for part in PARTS[1:]])
    edit_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(128, 64)}))
    with pytest.raises(ValueError, match=f"{NAME}: it is dense in the checkpoint"):
        load(folder)
    edit_config(folder, llm_int8_skip_modules=["lm_head", "layers.1.mlp.up_proj"])
    assert isinstance(load(folder).model.layers[1].mlp.up_proj, nn.Linear)


def test_packed_weight_where_the_config_says_dense_is_refused(tmp_path):
    _, folder = packed(tmp_path)
    edit_config(folder, llm_int8_skip_modules=["lm_head", "layers.1.mlp.up_proj"])
    with pytest.raises(ValueError, match=f"{NAME}: it is packed in the checkpoint"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4'.*read_bitsandbytes_with"),
        ({"blocksize": 48}, "blocksize.*48"),
    ],
)
def test_a_config_for_another_format_is_refused(tmp_path, options, message):
    _, folder = packed(tmp_path)
    edit_config(folder, **options)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_dequantized_model_saves_as_an_ordinary_one(tmp_path):
    _, folder = packed(tmp_path)
    dense = load(folder).dequantize()
    again = load(saved(dense, tmp_path / "again"))
    assert nf4_names(again) == [] and not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), logits(dense))


def test_state_dict_round_trip_within_the_model(tmp_path):
    model, folder = packed(tmp_path)
    again = load(folder)
    with torch.no_grad():
        again.model.layers[0].self_attn.q_proj.bias.zero_()
    again.load_state_dict(model.state_dict())
    assert isinstance(again.model.layers[0].self_attn.q_proj, NF4Linear)
    assert torch.equal(logits(again), logits(model))

"""from_pretrained with an NF4 configuration: what is packed, what stays dense, and what the model can do then."""

import copy
import sys

import pytest
import torch
from hf_helpers import IDS, LLAMA, edit_tensors, logits, nf4_names, saved, tiny
from processes import run_process
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.trainer_utils import validate_quantization_for_training

from minipeft.nf4 import NF4Linear, NF4Weight
from minipeft.nf4.hf import BitsAndBytesConfig, NF4Config

T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
BERT = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "attention_bias")}


def load(folder, config=None, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, quantization_config=config or NF4Config(), **options)


@pytest.fixture
def folder(tmp_path):
    return saved(tiny(), tmp_path / "dense")


def test_weights_are_those_nf4weight_gives_and_the_rest_is_untouched(folder):
    dense, model = tiny(), load(folder)
    names = nf4_names(model)
    assert len(names) == 2 * 7
    for name in names:
        expected = NF4Weight.quantize(dense.get_submodule(name).weight)
        assert torch.equal(model.get_submodule(name).nf4_weight().codes, expected.codes), name
        assert torch.equal(model.get_submodule(name).dequantize(), expected.dequantize()), name
    state = model.state_dict()
    for name, tensor in dense.state_dict().items():
        if not any(name == f"{packed}.weight" for packed in names):
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_forward_equals_the_dense_model_of_the_dequantized_weights(kind, tmp_path):
    dense = tiny(kind)
    model = load(saved(dense, tmp_path))
    for name in nf4_names(model):
        module = dense.get_submodule(name)
        w = NF4Weight.quantize(module.weight if kind == "llama" else module.weight.T.contiguous()).dequantize()
        module.weight = nn.Parameter(w if kind == "llama" else w.T.contiguous())
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-5)


def test_bitsandbytes_config_is_the_same_as_nf4_config(folder):
    ours = load(folder, NF4Config(double_quant=False, compute_dtype=torch.float32))
    theirs = load(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    assert torch.equal(logits(ours), logits(theirs))
    assert not theirs.model.layers[0].mlp.up_proj.nf4_weight().double_quant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_goes_to_the_dense_parts_and_into_the_packed_weights(folder, dtype):
    model = load(folder, NF4Config(compute_dtype=torch.float32, blocksize=128), dtype=dtype)
    layer = model.model.layers[0].self_attn.q_proj
    assert model.dtype == model.lm_head.weight.dtype == layer.bias.dtype == dtype
    assert layer.compute_dtype == torch.float32 and layer.blocksize == 128
    expected = NF4Weight.quantize(tiny().model.layers[0].self_attn.q_proj.weight.to(dtype), 128)
    assert torch.equal(layer.weight, expected.codes) and layer.dequantize().dtype == dtype


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_tied_embeddings_stay_dense(tmp_path, tied):
    folder = saved(tiny(tie_word_embeddings=tied), tmp_path)
    model = load(folder)
    assert isinstance(model.lm_head, nn.Linear)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # with a list the head is packed, as bitsandbytes does, but never one that is the embedding
    model = load(folder, NF4Config(skip_modules=["o_proj"]))
    assert isinstance(model.lm_head, NF4Linear) != tied
    assert isinstance(model.model.layers[0].self_attn.o_proj, nn.Linear)
    assert (model.config.quantization_config.skip_modules == ["o_proj"]) != tied


def test_modules_the_model_keeps_in_float32_stay_dense(tmp_path):
    folder = saved(tiny("t5", AutoModelForSeq2SeqLM, **T5, decoder_start_token_id=0), tmp_path)
    model = load(folder, auto=AutoModelForSeq2SeqLM, dtype=torch.float16)
    dense = model.encoder.block[0].layer[1].DenseReluDense
    assert isinstance(dense.wo, nn.Linear) and dense.wo.weight.dtype == torch.float32
    assert isinstance(dense.wi, NF4Linear)


def test_classifier_with_a_bias_stays_dense(tmp_path):
    folder = saved(tiny("bert", AutoModelForSequenceClassification, **BERT), tmp_path)
    model = load(folder, auto=AutoModelForSequenceClassification)
    assert isinstance(model.classifier, nn.Linear) and isinstance(model.bert.pooler.dense, NF4Linear)


def test_sharded_checkpoint(tmp_path):
    dense = tiny()
    whole, shards = saved(dense, tmp_path / "whole"), saved(dense, tmp_path / "shards", max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(whole)), logits(load(shards)))


def test_the_callers_config_is_not_changed(tmp_path):
    config = NF4Config(skip_modules=["o_proj"])
    load(saved(tiny(tie_word_embeddings=True), tmp_path), config)
    assert config.skip_modules == ["o_proj"]


def test_generate(folder):
    tokens = load(folder).generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert tokens.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map_on_cpu(folder, device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.equal(logits(load(folder, device_map=device_map)), logits(load(folder)))


def test_offload_to_disk_is_refused(folder):
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        load(folder, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_casts_change_the_dense_parts_only(folder, cast):
    model = load(folder)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.dequantize(torch.float32)
    model = model.to(torch.float16) if cast == "to" else getattr(model, cast)()
    assert model.dtype in (torch.float16, torch.bfloat16) and layer.bias.dtype == model.dtype
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert torch.isfinite(logits(model)).all()
    assert model.float().dtype == torch.float32


def test_a_copy_casts_itself_and_not_the_original(folder):
    model = load(folder)
    other = copy.deepcopy(model).half()
    assert other.dtype == torch.float16 and model.dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dequantize_gives_the_dense_model_back(kind, tmp_path):
    model = load(saved(tiny(kind), tmp_path / "dense"))
    packed = logits(model)
    model = model.dequantize()
    assert nf4_names(model) == [] and not model.is_quantized
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny(kind).modules()]
    torch.testing.assert_close(logits(model), packed, rtol=0, atol=1e-5)
    reloaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "again"))
    assert torch.equal(logits(reloaded), logits(model))


def test_dequantize_to_another_dtype_after_saving(folder, tmp_path):
    model = load(folder)
    saved(model, tmp_path / "packed")  # leaves a string as config.dtype
    assert model.dequantize().lm_head.weight.dtype == torch.float32
    assert load(folder).dequantize(torch.bfloat16).model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_trainer_refuses_the_model_until_an_adapter_is_attached(folder):
    model = load(folder)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        validate_quantization_for_training(model)
    model.hf_quantizer._minipeft_attached = True
    validate_quantization_for_training(model)


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _set(name, value):
    return lambda tensors: tensors.update({name: value})


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop(NAME), rf"{NAME}: it is not in the checkpoint"),
        (_drop("model.layers.0.self_attn.q_proj.bias"), r"model.layers.0.self_attn.q_proj.bias: it is not"),
        (_set(NAME, torch.zeros(128, 32)), rf"{NAME}: the weight is \(128, 32\), the module expects \(128, 64\)"),
        (_set(NAME, torch.full((128, 64), torch.nan)), rf"{NAME}: .*finite"),
        (_set(NAME, torch.zeros(4096, 1, dtype=torch.uint8)), rf"{NAME}: the weight is \(4096, 1\)"),
    ],
    ids=["weight missing", "bias missing", "shape", "nan", "packed"],
)
def test_a_bad_tensor_is_refused_by_name(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_nothing_to_pack_is_refused(folder):
    with pytest.raises(ValueError, match="LlamaForCausalLM has nothing to put into NF4"):
        load(folder, NF4Config(skip_modules=["model", "lm_head"]))


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = sys.modules["accelerate"] = None  # importing them raises ImportError
import torch
from transformers import AutoModelForCausalLM
from minipeft.nf4.hf import BitsAndBytesConfig, NF4Config
folder, packed = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
for quantization_config in (NF4Config(), config):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config)
model.save_pretrained(packed)
again = AutoModelForCausalLM.from_pretrained(packed)
ids = torch.arange(9)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
assert not [name for name in sys.modules if name.startswith(("bitsandbytes.", "accelerate."))]
print("fine")
"""


def test_needs_neither_bitsandbytes_nor_accelerate(folder, tmp_path):
    done = run_process([sys.executable, "-c", WITHOUT, str(folder), str(tmp_path / "packed")])
    assert done.stdout.strip().endswith("fine"), done.stderr

"""A 4-bit model to code that knows bitsandbytes': what it answers, how it counts, and that every cast of it runs."""

import copy
import io

import pytest
import torch
import transformers
from hf_helpers import IDS, logits, nf4_names, saved, tiny
from tiny import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from minipeft import LoraConfig, NF4Config, get_peft_model, quantize_model
from minipeft.nf4 import NF4Linear

load = AutoModelForCausalLM.from_pretrained

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to float16": lambda m: m.to(torch.float16),
    "to dtype=": lambda m: m.to(dtype=torch.bfloat16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "to another's": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type": lambda m: m.type(torch.float16),
    "float": lambda m: m.float(),
    "there and back": lambda m: m.half().float(),
}
MEANT = {
    "half": torch.float16,
    "to float16": torch.float16,
    "to device and dtype": torch.float16,
    "type": torch.float16,
}
MEANT |= {"bfloat16": torch.bfloat16, "to dtype=": torch.bfloat16, "to another's": torch.bfloat16}


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {"itself": lambda m: m, "copied": copy.deepcopy, "unpickled": pickled, "twice": lambda m: pickled(pickled(m))}


def dtypes(model):
    """The dtypes of the parameters, and of those that packed layers stand for."""
    packed = {id(m.weight): m.weight_dtype for m in model.modules() if isinstance(m, NF4Linear)}
    return {packed.get(id(p), p.dtype) for p in model.parameters()}


def in_float64(model):
    """The logits of a Llama or GPT-2 by torch's own layers in float64, from the numbers that `model` now holds."""
    twin = copy.deepcopy(model)
    if getattr(twin, "peft_config", None):
        twin = twin.float().merge_and_unload()
    elif getattr(twin, "is_quantized", False):
        twin = twin.float().dequantize()
    plain = type(tiny(model.config.model_type))(model.config).double().eval()
    plain.load_state_dict({name: tensor.double() for name, tensor in twin.state_dict().items()})
    for name, buffer in plain.named_buffers():  # the frequencies of the positions, which casts round, too
        buffer.copy_(twin.get_buffer(name))
    return logits(plain)


def assert_runs_as_float64(model, cast):
    dtype = MEANT.get(cast, torch.float32)
    assert dtypes(model) == {dtype}
    expected, found = in_float64(model), logits(model)
    assert found.dtype == dtype
    error = ((found.double() - expected).norm() / expected.norm()).item()
    assert error < {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_runs_however_it_came(tmp_path, cast, way):
    kind = "gpt2" if cast in ("half", "to dtype=") else "llama"
    model = load(saved(tiny(kind).bfloat16(), tmp_path), quantization_config=NF4Config(), dtype=torch.bfloat16)
    codes = {name: model.get_submodule(name).nf4_weight().clone() for name in nf4_names(model)}
    model = CASTS[cast](WAYS[way](model))
    assert_runs_as_float64(model, cast)
    model = WAYS[way](model)
    assert_runs_as_float64(model, cast)
    for name, before in codes.items():
        for field, tensor in model.get_submodule(name).nf4_weight().tensors().items():
            assert torch.equal(tensor, before.tensors()[field])


ENDS = {
    "merged": lambda m: m.merge_adapter() or m,
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "requantize": lambda m: m.merge_and_unload(requantize=True),
    "unload": lambda m: m.unload(),
    "unload, dequantize": lambda m: m.unload().dequantize(),
}


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("way", ["itself", "copied", "unpickled"])
@pytest.mark.parametrize("cast", ["half", "to dtype=", "float"])
@pytest.mark.parametrize("first", ["cast", "merge"])
def test_a_cast_model_ends_in_one_dtype_and_runs(first, cast, way, end):
    model = quantize_model(tiny().bfloat16())
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=".*v_proj", init_lora_weights=False)
    model = WAYS[way](get_peft_model(model, config).eval())
    steps = [CASTS[cast], ENDS[end]]
    if first == "merge":
        steps.reverse()
    for step in steps:
        model = WAYS[way](step(model))
    assert_runs_as_float64(model, cast)


@pytest.mark.parametrize("cast", ["half", "float"])
def test_a_model_cast_while_merged_unmerges_to_the_packed_weights(cast):
    model = get_peft_model(quantize_model(tiny().bfloat16()), LoraConfig(r=4, init_lora_weights=False)).eval()
    layer = model.model.layers[0].self_attn.q_proj
    codes = layer.nf4_weight().clone()
    model.merge_adapter()
    CASTS[cast](model)
    assert layer.dense_merged.dtype == MEANT.get(cast, torch.float32)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, codes.codes) and torch.equal(layer.absmax, codes.absmax)
    assert_runs_as_float64(model, cast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_packed_folder_comes_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    model = load(saved(tiny().bfloat16(), tmp_path / "dense"), quantization_config=NF4Config(), dtype=torch.bfloat16)
    packed = load(saved(model, tmp_path / "packed"), dtype=dtype)
    cast = {torch.float16: "half", torch.bfloat16: "bfloat16"}.get(dtype, "float")
    assert_runs_as_float64(packed, cast)
    assert_runs_as_float64(load(saved(packed, tmp_path / "again")), cast)
    assert_runs_as_float64(packed.dequantize(), cast)


def test_dequantize_to_a_dtype_takes_the_whole_model(tmp_path):
    model = load(saved(tiny(), tmp_path), quantization_config=NF4Config()).dequantize(torch.bfloat16)
    assert_runs_as_float64(model, "bfloat16")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_layer_by_itself_is_cast(way, dtype):
    torch.manual_seed(0)
    layer = WAYS[way](NF4Linear.from_linear(nn.Linear(128, 32, dtype=torch.bfloat16)))
    layer = WAYS[way](layer.to(dtype))
    dense, x = layer.to_dense(), torch.randn(5, 128).to(dtype)
    assert {dense.weight.dtype, dense.bias.dtype, layer.dequantize().dtype, layer(x).dtype} == {dtype}
    expected = x.double() @ layer.dequantize(torch.float64).T + layer.bias.double()
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]


def cast_beside(model, dtype):
    """As PEFT's preparation for training and TRL's trainers do: parameter by parameter, past the packed ones."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
@pytest.mark.parametrize(("packed", "beside"), [("bfloat16", "float"), ("float", "bfloat16"), ("half", "float")])
def test_layers_come_back_in_the_dtype_of_the_rest(packed, beside, targets):
    dtype = MEANT.get(beside, torch.float32)

    def made():
        return cast_beside(quantize_model(CASTS[packed](tiny())), dtype)

    assert_runs_as_float64(made().dequantize(), beside)
    model = get_peft_model(made(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    before = logits(model).double()
    merged = model.merge_and_unload()
    assert_runs_as_float64(merged, beside)
    assert (logits(merged).double() - before).norm() / before.norm() < 3e-2


def test_a_model_of_several_dtypes_keeps_them():
    model = quantize_model(tiny().bfloat16())
    model.lm_head.float()
    merged = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).merge_and_unload()
    assert merged.lm_head.weight.dtype == torch.float32
    assert {p.dtype for p in merged.model.parameters()} == {torch.bfloat16}


# As bitsandbytes' model answers


def both(tmp_path, kind="llama"):
    pytest.importorskip("bitsandbytes")
    folder = saved(tiny(kind), tmp_path)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    theirs = load(folder, quantization_config=transformers.BitsAndBytesConfig(**options))
    return load(folder, quantization_config=NF4Config(double_quant=False)), theirs


def test_it_answers_as_bitsandbytes_model_does(tmp_path):
    ours, theirs = both(tmp_path)
    for model in (ours, quantize_model(tiny()), copy.deepcopy(ours), pickled(ours)):
        for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
            assert getattr(model, name) == getattr(theirs, name), name
    mine, yours = ours.config.quantization_config, theirs.config.quantization_config
    fields = [*vars(yours), "load_in_4bit", "load_in_8bit"]
    # None is ours for the input's, to which bitsandbytes changes its own at the first call.
    named = {name for name in fields if not name.startswith("_")} - {"quant_method", "bnb_4bit_compute_dtype"}
    assert len(named) == 9
    for name in named:
        assert getattr(mine, name) == getattr(yours, name), name
    assert mine.quantization_method() == yours.quantization_method() and mine.is_quantizable()
    assert mine.to_dict()["quant_method"] == yours.quant_method


def test_the_answers_go_with_the_packed_layers():
    model = quantize_model(tiny()).dequantize()
    merged = get_peft_model(quantize_model(tiny()), LoraConfig(r=2)).merge_and_unload()
    for plain in (model, merged):
        assert type(plain) is type(tiny())
        assert not plain.is_quantized and not hasattr(plain, "quantization_method")
        assert not hasattr(plain, "is_loaded_in_4bit")
    again = get_peft_model(quantize_model(tiny()), LoraConfig(r=2)).merge_and_unload(requantize=True)
    assert again.is_quantized and again.is_loaded_in_4bit and type(again).__name__ == "LlamaForCausalLM"


def test_its_class_makes_plain_models(tmp_path):
    model, folder = quantize_model(tiny()), saved(tiny(), tmp_path)
    for new in (type(model)(model.config), type(model).from_pretrained(folder)):
        assert type(new) is type(tiny()) and not hasattr(new, "is_loaded_in_4bit")
    assert type(model).from_pretrained(folder, quantization_config=NF4Config()).is_loaded_in_4bit


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("exclude_embeddings", [False, True])
def test_parameters_are_counted_as_those_of_the_dense_model(tmp_path, kind, exclude_embeddings):
    ours, theirs = both(tmp_path, kind)
    dense = tiny(kind).num_parameters(exclude_embeddings=exclude_embeddings)
    for model in (ours, theirs, copy.deepcopy(ours), pickled(ours).half()):
        assert model.num_parameters(exclude_embeddings=exclude_embeddings) == dense
    adapted = get_peft_model(ours, LoraConfig(r=2, target_modules="all-linear"))
    added = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapted.num_parameters(exclude_embeddings=exclude_embeddings) == dense + added
    assert adapted.num_parameters(only_trainable=True, exclude_embeddings=exclude_embeddings) == added
    assert adapted.merge_and_unload().num_parameters(exclude_embeddings=exclude_embeddings) == dense


def test_an_odd_number_of_weights_is_counted_whole():
    class Odd(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner, self.head = nn.Linear(63, 3), nn.Linear(3, 2)
            self.post_init()

    model = quantize_model(Odd(transformers.PretrainedConfig()), NF4Config(skip_modules=["head"]))
    assert model.num_parameters() == 63 * 3 + 3 + 3 * 2 + 2


def test_an_option_can_be_set_by_bitsandbytes_name():
    config = NF4Config()
    config.bnb_4bit_compute_dtype = "bfloat16"
    config.bnb_4bit_use_double_quant = False
    config.llm_int8_skip_modules = ["lm_head"]
    config.load_in_4bit = True
    assert (config.compute_dtype, config.double_quant, config.skip_modules) == (torch.bfloat16, False, ["lm_head"])
    for name, value in {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4", "llm_int8_threshold": 5.0}.items():
        with pytest.raises(ValueError, match=f"{name}=.* it is always"):
            setattr(config, name, value)
    with pytest.raises(TypeError, match="bnb_4bit_use_double_quant must be True or False"):
        config.bnb_4bit_use_double_quant = 1


def test_it_generates_after_a_cast():
    model = quantize_model(tiny(eos_token_id=None)).half()
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 11)


def test_frequencies_keep_their_numbers_when_layers_come_out_of_4_bits() -> None:
    model = quantize_model(tiny_llama().bfloat16(), NF4Config())
    model.model.rotary_emb.inv_freq = tiny_llama().model.rotary_emb.inv_freq
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

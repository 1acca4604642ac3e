"""Checkpoints exchanged with transformers + bitsandbytes, both ways.

bitsandbytes repacks a weight for CPUs with AVX512-BF16 when it runs, and then computes in bfloat16: that is
turned off on its layers (`plain`) so that both sides do the same arithmetic on every machine.
"""

import pytest
import torch
import transformers
from hf_helpers import IDS, edit_config, edit_tensors, logits, nf4_names, saved, tiny
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM

from minipeft.nf4.hf import BitsAndBytesConfig, NF4Config, quantize_model, read_bitsandbytes_with

bnb = pytest.importorskip("bitsandbytes")
load = AutoModelForCausalLM.from_pretrained


def bnb_load(folder, config=None, **options):
    """Load with transformers + bitsandbytes, whoever reads their checkpoints at the moment."""
    if config is not None:  # None is not the same as nothing: it tells transformers to ignore config.json
        options["quantization_config"] = config
    read_bitsandbytes_with("transformers")
    try:
        model = load(folder, **options)
    finally:
        read_bitsandbytes_with("minipeft")
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    return model


def plain(model):
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def bnb_config(**options):
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def assert_same_weights(ours, theirs):
    """Bit-equal dequantized weights, by name."""
    names = nf4_names(ours)
    assert names == [n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    for name in names:
        weight = theirs.get_submodule(name).weight
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(ours.get_submodule(name).dequantize(), expected), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_their_checkpoint_gives_their_logits(tmp_path, kind, double, storage):
    config = bnb_config(bnb_4bit_use_double_quant=double, bnb_4bit_quant_storage=storage)
    theirs = plain(bnb_load(saved(tiny(kind), tmp_path / "dense"), config))
    ours = load(saved(theirs, tmp_path / "packed"))
    assert_same_weights(ours, theirs)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    again = load(saved(ours, tmp_path / "again"))
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_their_bfloat16_checkpoint(tmp_path, double, storage):
    config = bnb_config(
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = plain(bnb_load(saved(tiny(), tmp_path / "dense"), config, dtype=torch.bfloat16))
    ours = load(saved(theirs, tmp_path / "packed"))
    assert ours.dtype == torch.bfloat16
    assert_same_weights(ours, theirs)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0.02)


def test_their_bfloat16_checkpoint_after_a_run_on_an_avx512_cpu(tmp_path):
    # where the CPU has AVX512-BF16, running makes them save scales that are to be computed in bfloat16
    config = bnb_config(bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = bnb_load(saved(tiny(), tmp_path / "dense"), config, dtype=torch.bfloat16)
    for module in theirs.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            state.state2.dtype = torch.bfloat16
    folder = saved(theirs, tmp_path / "packed")
    assert_same_weights(load(folder), bnb_load(folder))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_checkpoint_gives_them_our_logits(tmp_path, kind, double, dtype):
    # 128 wide, for blocks of 128: bitsandbytes 0.50.2 decodes rows shorter than a block wrongly on CPUs with AVX512
    wide = tiny(kind, **{"hidden_size" if kind == "llama" else "n_embd": 128})
    config = NF4Config(double_quant=double, compute_dtype=dtype, blocksize=128)
    ours = load(saved(wide, tmp_path / "dense"), quantization_config=config, dtype=dtype)
    theirs = plain(bnb_load(saved(ours, tmp_path / "packed")))
    assert_same_weights(ours, theirs)
    atol = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=atol)


@pytest.mark.parametrize("tied", [True, False])
def test_our_skip_list_tells_them_what_is_dense(tmp_path, tied):
    folder = saved(tiny(tie_word_embeddings=tied), tmp_path / "dense")
    ours = load(folder, quantization_config=NF4Config(skip_modules=["o_proj"]))
    theirs = plain(bnb_load(saved(ours, tmp_path / "packed")))
    assert_same_weights(ours, theirs)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)


def test_a_fresh_quantization_with_transformers_own_config_is_left_to_bitsandbytes(tmp_path):
    model = load(saved(tiny(), tmp_path), quantization_config=bnb_config())
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)


def test_readers_have_two_names():
    with pytest.raises(ValueError, match="library is 'bnb'; expected 'minipeft' or 'transformers'"):
        read_bitsandbytes_with("bnb")


def test_single_quantization_packs_the_same_bytes(tmp_path):
    folder = saved(tiny(), tmp_path / "dense")
    theirs = bnb_load(folder, bnb_config())
    ours = load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    for name in nf4_names(ours):
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight.data), name


def test_fp4_tensors_are_refused_by_name_even_if_the_config_says_nf4(tmp_path):
    theirs = bnb_load(
        saved(tiny(), tmp_path / "dense"),
        transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    )
    folder = saved(theirs, tmp_path / "packed")
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_type='fp4'"):
        load(folder)
    edit_config(folder, bnb_4bit_quant_type="nf4")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight: it is packed as fp4"):
        load(folder)


def test_our_adapter_free_training_step_matches_theirs(tmp_path):
    """The input gradient through every packed layer, at the embeddings."""
    ours = load(saved(tiny(), tmp_path / "dense"), quantization_config=NF4Config(compute_dtype=torch.float32))
    theirs = plain(bnb_load(saved(ours, tmp_path / "packed")))
    grads = []
    for model in (ours, theirs):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_their_damaged_checkpoint_is_refused_by_name(tmp_path):
    theirs = bnb_load(saved(tiny(), tmp_path / "dense"), bnb_config(bnb_4bit_use_double_quant=True))
    folder = saved(theirs, tmp_path / "packed")
    name = "model.layers.0.self_attn.v_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(f"{name}.nested_quant_map"))
    with pytest.raises(ValueError, match=f"{name}: .*nested_quant_map"):
        load(folder)


def test_layers_of_a_class_of_their_own_stay_dense_with_both(tmp_path):
    # Theirs passes for a model in 4 bits, ours says what it is.
    folder = saved(tiny("falcon", vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4), tmp_path)
    read_bitsandbytes_with("transformers")
    try:
        theirs = load(folder, quantization_config=bnb_config())
    finally:
        read_bitsandbytes_with("minipeft")
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in theirs.modules())
    for make in (lambda: load(folder, quantization_config=NF4Config()), lambda: quantize_model(load(folder))):
        with pytest.raises(ValueError, match=r"nothing to put into NF4: .*; its FalconLinear stays dense"):
            make()


def test_packed_experts_are_refused_by_bitsandbytes_and_dense_ones_are_read(tmp_path):
    family = FAMILIES["Mixtral"]
    folder = saved(quantize_model(family.build()), tmp_path / "packed")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        bnb_load(folder)
    ours = quantize_model(family.build(), NF4Config(experts=False))
    theirs = bnb_load(saved(ours, tmp_path / "dense"))
    assert_same_weights(ours, theirs)
    for name, weight in ours.named_parameters():
        if weight.dim() == 3:
            assert torch.equal(theirs.get_parameter(name), weight)

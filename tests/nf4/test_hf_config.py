"""NF4Config, BitsAndBytesConfig and their form in config.json."""

import json

import pytest
import torch
import transformers

from minipeft.nf4.hf import BitsAndBytesConfig, NF4Config

BNB_4BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_defaults_are_blocks_of_64_with_double_quantization():
    config = NF4Config()
    assert (config.blocksize, config.double_quant) == (64, True)
    assert config.compute_dtype is None and config.skip_modules is None


def test_bitsandbytes_config_has_transformers_defaults():
    ours, theirs = BitsAndBytesConfig(**BNB_4BIT), transformers.BitsAndBytesConfig(**BNB_4BIT)
    assert isinstance(ours, NF4Config)
    assert ours.double_quant == theirs.bnb_4bit_use_double_quant
    assert ours.compute_dtype == theirs.bnb_4bit_compute_dtype
    assert ours.skip_modules == theirs.llm_int8_skip_modules
    with pytest.raises(ValueError, match=r"bnb_4bit_quant_type='fp4'.*pass bnb_4bit_quant_type='nf4'"):
        BitsAndBytesConfig(load_in_4bit=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_bitsandbytes_config_takes_transformers_arguments(dtype, caplog):
    config = BitsAndBytesConfig(
        **BNB_4BIT,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    assert config.double_quant and config.compute_dtype == torch.bfloat16
    assert config.skip_modules == ["lm_head"]
    assert "bfloat16 has no effect: weights are kept as uint8" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True}, "load_in_8bit=True.*load_in_4bit=True"),
        ({}, "load_in_4bit=False"),
        ({**BNB_4BIT, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4'"),
        ({**BNB_4BIT, "llm_int8_threshold": 5.0}, "llm_int8_threshold=5.0"),
        ({**BNB_4BIT, "llm_int8_enable_fp32_cpu_offload": True}, "llm_int8_enable_fp32_cpu_offload=True"),
        ({**BNB_4BIT, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True"),
        ({**BNB_4BIT, "bnb_4bit_nested": 1}, "bnb_4bit_nested=1"),
        ({**BNB_4BIT, "bnb_4bit_quant_storage": "int3"}, "bnb_4bit_quant_storage is 'int3'"),
        ({**BNB_4BIT, "bnb_4bit_compute_dtype": "int8"}, "compute_dtype is 'int8'"),
    ],
)
def test_what_is_not_nf4_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        BitsAndBytesConfig(**options)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"blocksize.*48"):
        NF4Config(blocksize=48)
    with pytest.raises(TypeError, match="double_quant must be True or False"):
        NF4Config(double_quant=1)
    with pytest.raises(TypeError, match="skip_modules must be a list"):
        NF4Config(skip_modules="lm_head")


@pytest.mark.parametrize(
    "config",
    [NF4Config(), NF4Config(128, False, torch.bfloat16, ["a", "b"]), BitsAndBytesConfig(**BNB_4BIT)],
    ids=["default", "other", "bitsandbytes"],
)
def test_config_json_round_trip(config):
    on_disk = json.loads(json.dumps(config.to_dict()))
    assert on_disk["quant_method"] == "bitsandbytes"
    assert vars(NF4Config.from_dict(on_disk)) == vars(config)


def test_transformers_reads_our_form_and_we_read_theirs():
    ours = NF4Config(double_quant=True, compute_dtype=torch.bfloat16, skip_modules=["lm_head"])
    theirs = transformers.BitsAndBytesConfig.from_dict(ours.to_dict())
    assert theirs.load_in_4bit and theirs.bnb_4bit_quant_type == "nf4"
    assert theirs.bnb_4bit_use_double_quant and theirs.bnb_4bit_compute_dtype == torch.bfloat16
    assert theirs.llm_int8_skip_modules == ["lm_head"]
    assert vars(NF4Config.from_dict(theirs.to_dict())) == vars(ours)


def test_own_names_work_as_a_dictionary_too():
    config = NF4Config.from_dict({"quant_method": "minipeft_nf4", "blocksize": 128})
    assert config.blocksize == 128


def test_unknown_entry_of_a_checkpoint_is_refused_unless_it_asks_for_nothing():
    on_disk = NF4Config().to_dict()
    assert NF4Config.from_dict({**on_disk, "bnb_4bit_rotation": None}).blocksize == 64
    with pytest.raises(ValueError, match="bnb_4bit_rotation"):
        NF4Config.from_dict({**on_disk, "bnb_4bit_rotation": "hadamard"})

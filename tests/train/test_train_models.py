import socket

import pytest
import torch
from tiny_runs import make_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from minipeft import PrefixTuningConfig, get_peft_model
from minipeft.nf4 import NF4Linear
from minipeft.train import (
    MissingExtraError,
    ModelLoadError,
    load_base_model,
    load_position_limit,
    load_tokenizer,
    resolve_device,
)
from minipeft.train.models import locate_model, text_positions


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_model(adapter=False, vocab_size=400).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The same two-layer Llama as llama.cpp stores it, with a byte-level vocabulary."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = make_model(adapter=False, vocab_size=300, num_key_value_heads=4, tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}>" for i in range(300)])
    writer.add_token_types([1] * 300)
    writer.add_token_merges(["< 1"])
    writer.add_eos_token_id(2)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"}
    names |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            kind = rest.removesuffix(".weight")
            if kind in ("self_attn.q_proj", "self_attn.k_proj"):
                # llama.cpp interleaves the two halves that rotary embeddings turn.
                tensor = tensor.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
            target = f"blk.{layer}.{names[kind]}.weight"
        else:
            target = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(target, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def no_network(*args, **kwargs):
    raise AssertionError("the network was tried")


def test_directory_loads_as_it_is(model_dir):
    model = load_base_model(model_dir, device="cpu")
    expected = make_model(adapter=False, vocab_size=400)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=0)
    assert not model.training
    assert load_base_model(model_dir, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load_position_limit(model_dir) == 128
    assert load_tokenizer(model_dir).eos_token == "<|im_end|>"


def test_directory_loads_in_four_bits(model_dir):
    model = load_base_model(model_dir, quantize="nf4", device="cpu")
    linears = [m for m in model.model.modules() if isinstance(m, NF4Linear)]
    assert len(linears) == 14
    ids = torch.tensor([[3, 4, 5]])
    difference = model(ids).logits - make_model(adapter=False, vocab_size=400)(ids).logits
    assert difference.abs().max() > 0


def test_gguf_file_loads_dequantized_and_in_four_bits(gguf_file):
    path, expected = gguf_file
    ids = torch.tensor([[3, 4, 5]])
    model = load_base_model(path, dtype="float32", device="cpu")
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert load_position_limit(path) == 128
    quantized = load_base_model(str(path), quantize="nf4", dtype="float32", device="cpu")
    assert len([m for m in quantized.modules() if isinstance(m, NF4Linear)]) == 14
    assert quantized(ids).logits.isfinite().all()


def test_gguf_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"packages gguf and accelerate: pip install 'minipeft\[demo\]'"):
        load_base_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "no model at .*nope: expected a directory with config.json"),
        ("/nowhere/at/all", "no model at /nowhere/at/all"),
        ("~/nope-at-all", "no model at ~/nope-at-all"),
        ("a/b/c", "no model at a/b/c"),
        ("here/nope", "no model at here/nope"),  # there is a directory `here`
        ("nope.gguf", "no model at nope.gguf"),
        ("here", r"no model in directory here: expected a config.json there"),
        ("here/file.bin", r"no model at here/file.bin: expected a model directory or a .gguf file"),
        ("here/broken.gguf", "cannot load a model from here/broken.gguf: "),
        ("broken", "cannot load a model from broken: "),
    ],
)
def test_path_that_is_no_model_is_one_sentence_without_the_network(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file.bin").write_bytes(b"x")
    (tmp_path / "here" / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "nothing-like-it"}')
    with pytest.raises(ModelLoadError, match=message) as raised:
        load_base_model(name)
    assert "\n" not in str(raised.value)


def test_hub_names_are_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate_model("gpt2") == "gpt2"
    assert locate_model("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


def test_unreachable_hub_is_told_at_once(tmp_path, monkeypatch):
    def unknown_host(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    with pytest.raises(ModelLoadError, match=r"no model directory or file at nope-nothing, and huggingface.co cannot"):
        load_base_model("nope-nothing")


def test_directory_without_tokenizer_is_one_sentence(tmp_path):
    make_model(adapter=False).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"cannot load a tokenizer from ") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_devices_are_checked():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu0'"):
        resolve_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            resolve_device("cuda:1")


def test_a_prefix_takes_the_first_positions_of_a_learned_table_and_none_of_rotated_keys(tmp_path):
    config = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    GPT2Config(n_positions=16, n_layer=1, n_embd=32, n_head=2).save_pretrained(tmp_path / "gpt2")
    LlamaConfig(max_position_embeddings=16).save_pretrained(tmp_path / "llama")
    assert text_positions(str(tmp_path / "gpt2"), config) == (16, 4)
    assert text_positions(str(tmp_path / "llama"), config) == (16, 0)
    # As the model itself has it.
    model = get_peft_model(GPT2LMHeadModel(GPT2Config.from_pretrained(tmp_path / "gpt2")), config)
    assert model(torch.ones(1, 12, dtype=torch.long)).logits.shape[1] == 12
    with pytest.raises(ValueError, match="the model has 16 positions, of which 4 are the virtual tokens'"):
        model(torch.ones(1, 13, dtype=torch.long))

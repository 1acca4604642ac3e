"""From a GGUF file to an ordinary model folder, on a file made here with the same parts."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from tiny_folder import CHAT_TEMPLATE, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from minipeft.demo import assets
from minipeft.train.errors import MissingExtraError

gguf = pytest.importorskip("gguf")

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
FILE = assets.SMOLLM2_GGUF.members[0].name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama with GPT-2's byte-level tokens, in Q4_1 as the real file."""
    folder = tmp_path_factory.mktemp("gguf")
    vocabulary = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "12"]
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_name("A name 135M Ep2")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    rng = np.random.default_rng(0)
    kv_width = HIDDEN // HEADS * KV_HEADS
    matrices = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv_width, HIDDEN), "attn_v": (kv_width, HIDDEN)}
    matrices |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
    matrices |= {"ffn_down": (HIDDEN, INNER)}

    def add(name, *shape):
        values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + values)
            return
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name, shape in {**matrices, "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}.items():
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.fixture
def fetched(source, tmp_path, monkeypatch):
    """The calls of `fetch`; the cache is new."""
    calls = []
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "fetch", lambda asset, say: calls.append(asset) or source)
    return calls


def silent(line):
    pass


def test_the_folder_is_an_ordinary_bfloat16_model(fetched):
    folder = assets.smollm2_folder(silent)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    assert (model.generation_config.eos_token_id, model.config.tie_word_embeddings) == (2, True)


def test_the_tokenizer_splits_numbers_and_keeps_the_rest(fetched):
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2_folder(silent))
    assert tokenizer.tokenize("a12 3") == ["a", "1", "2", "Ġ", "3"]
    text = "Café 1984?\n<ok> it's\t7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_it_is_converted_once_and_again_when_damaged(fetched):
    folder = assets.smollm2_folder(silent)
    assert assets.smollm2_folder(silent) == folder and len(fetched) == 1
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not assets.is_whole(folder)
    assets.smollm2_folder(silent)
    assert weights.read_bytes() == whole and len(fetched) == 2


@pytest.mark.parametrize("sums", [None, "{}", "[1]", "not json", '{"config.json": "0"}'])
def test_a_folder_without_its_sums_is_not_whole(sums, fetched):
    folder = assets.smollm2_folder(silent)
    (folder / assets.SUMS).unlink()
    if sums is not None:
        (folder / assets.SUMS).write_text(sums)
    assert not assets.is_whole(folder)


def test_without_gguf_it_says_what_to_install_before_downloading(fetched, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(MissingExtraError, match=r"needs gguf: run pip install 'minipeft\[demo\]'"):
        assets.smollm2_folder(silent)
    assert not fetched

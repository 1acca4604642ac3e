"""GGUF models: transformers dequantizes the file into a dense model, and quantize_model packs that."""

import numpy as np
import pytest
import torch
from hf_helpers import LLAMA, logits, nf4_names, saved
from transformers import AutoModelForCausalLM, GgufConfig

from minipeft.nf4 import NF4Weight
from minipeft.nf4.hf import NF4Config, quantize_model

gguf = pytest.importorskip("gguf")


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama in GGUF: matrices in 8 bits (Q8_0), norms in float32."""
    hidden, inner, heads, kv = (
        LLAMA[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(LLAMA["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name, *shape):
        values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    kv_width = hidden // heads * kv
    matrices = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv_width, hidden),
        "attn_v": (kv_width, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for name in ("token_embd", "output"):
        add(f"{name}.weight", LLAMA["vocab_size"], hidden)
    add("output_norm.weight", hidden)
    for i in range(LLAMA["num_hidden_layers"]):
        for name, shape in {**matrices, "attn_norm": (hidden,), "ffn_norm": (hidden,)}.items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def load_gguf(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="tiny.gguf",
        dtype=dtype,
        quantization_config=GgufConfig(gguf_file="tiny.gguf", dequantize=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_then_quantize_model(folder, tmp_path, dtype):
    dense = load_gguf(folder, dtype)
    model = quantize_model(load_gguf(folder, dtype), NF4Config())
    names = nf4_names(model)
    assert len(names) == 2 * 7 and model.is_quantized
    for name in names:
        expected = NF4Weight.quantize(dense.get_submodule(name).weight)
        assert torch.equal(model.get_submodule(name).weight, expected.codes), name
        assert torch.equal(model.get_submodule(name).dequantize(), expected.dequantize()), name
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "packed"))
    assert torch.equal(logits(again), logits(model))


def test_both_at_once_is_refused_by_transformers(folder):
    with pytest.raises(ValueError, match="cannot combine Quantization and loading a model from a GGUF file"):
        AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", quantization_config=NF4Config())

"""GGUF files of models and adapters: read again by gguf and transformers, run by llama.cpp where it is there."""

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command_line import ok, refused
from gguf_models import FAMILIES, SPLITS, TEXTS, save, tokenizer_of
from tiny_folder import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from minipeft import LoraConfig, NF4Config, PeftModel, get_peft_model, quantize_model

LONG = [(7 * i + 3) % 300 for i in range(60)]


def export(path: Path, output: Path, *options: Any) -> Path:
    assert f"written: {output}" in ok("export", path, "--output", output, *options)
    return output


def logits(model: Any, ids: list[int] = LONG) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float()


@contextlib.contextmanager
def llama_cpp(file: Path, lora: Path | None = None) -> Iterator[Callable[..., Any]]:
    """llama.cpp's server over a file: a function that asks it."""
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp, which has llama.cpp in it, is not installed")
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.port = str(file), 256, False, 0
    params.cpuparams.n_threads = params.n_parallel = 1
    if lora is not None:
        info = llama.CommonAdapterLoraInfo(str(lora), 1.0)
        params.lora_adapters = [info]
    server = llama.Server(params)

    def ask(path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    yield ask


def off(ask: Callable[..., Any], expected: torch.Tensor, ids: list[int] = LONG) -> float:
    """How far llama.cpp's log-probabilities of the token after `ids` are from those of the last of (T, V) logits."""
    # Without the grammar it may draw a part of a character, of which the server tells nothing.
    asked = {"n_predict": 1, "n_probs": expected.shape[1], "cache_prompt": False, "grammar": "root ::= [a-zA-Z]+"}
    answer = ask("/completion", prompt=ids, temperature=1.0, **asked)
    found = {row["id"]: row["logprob"] for row in answer["completion_probabilities"][0]["top_logprobs"]}
    right = expected[-1].double().log_softmax(-1)
    assert len(found) > 300
    return max(abs(right[id].item() - value) for id, value in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(tmp_path: Path, family: str) -> None:
    model = save(tmp_path / "model", family)
    file = export(tmp_path / "model", tmp_path / "model.gguf")
    with llama_cpp(file) as ask:
        assert off(ask, logits(model)) < 2e-2 * logits(model).std()
        one = LONG[:1]
        assert off(ask, logits(model, one), one) < 2e-2 * logits(model).std()


@pytest.mark.parametrize("family", ["llama", "llama, tied", "mistral", "qwen2"])
def test_transformers_reads_the_same_model_from_the_file(tmp_path: Path, family: str) -> None:
    model = save(tmp_path / "model", family)
    export(tmp_path / "model", tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*SPLITS, "spm"])
def test_llama_cpp_has_the_same_tokens(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "model", kind=kind)
    file = export(tmp_path / "model", tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [
        *TEXTS,
        " leading",
        "trailing ",
        "a",
        "",
        "don't WE'LL 1234567 x²",
        "\n\n\n  \t x",
        "<|im_end|>",
        "<tool>x",
    ]
    with llama_cpp(file) as ask:
        for text in texts:
            options = {"add_special": True, "parse_special": True}
            assert ask("/tokenize", content=text, **options)["tokens"] == tokenizer(text)["input_ids"], text
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": "Hi"}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert ask("/apply-template", messages=chat)["prompt"] == prompt


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3, "up_proj": 0.5}},
    "no alpha": {"lora_alpha": 0},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


def adapted(folder: Path, model: Any, **settings: Any) -> Any:
    """Write an adapter that does something; the adapted model."""
    torch.manual_seed(1)
    plain = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**(plain | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", LORAS)
def test_llama_cpp_runs_the_adapter_over_the_base(tmp_path: Path, kind: str, family: str) -> None:
    base = export_base(tmp_path, family)
    model = adapted(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "model"), **LORAS[kind])
    lora = export(tmp_path / "adapter", tmp_path / "adapter.gguf", "--base", tmp_path / "model")
    right = logits(model)
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    with llama_cpp(base, lora) as ask:
        if kind == "no alpha":
            assert off(ask, plain) < 2e-2 * plain.std()
        else:
            assert off(ask, right) < 2e-2 * right.std() < 0.1 * off(ask, plain)


def export_base(folder: Path, family: str) -> Path:
    save(folder / "model", family)
    return export(folder / "model", folder / "model.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_adapters_tensors_make_its_update_in_gguf_itself(tmp_path: Path, family: str) -> None:
    save(tmp_path / "model", family)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "target_modules": ["v_proj", "down_proj", "q_proj"]}
    adapted(tmp_path / "adapter", base, **settings)
    # By the base model that the adapter names.
    reader = gguf.GGUFReader(export(tmp_path / "adapter", tmp_path / "adapter.gguf"))
    assert reader.get_field("general.type").contents() == "adapter"
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter"
    ).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, layer in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj"), ("attn_q", "self_attn.q_proj")):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{letter}"] for letter in "ab")
        path = f"model.layers.1.{layer}.weight"
        update = (merged.get_parameter(path) - plain.get_parameter(path)).detach().double().numpy()
        if name == "attn_q" and family == "llama":
            # llama.cpp's order: of each of 4 heads of 16 rows, the halves by turns.
            update = update.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
        np.testing.assert_allclose(alpha / len(a) * b @ a, update, atol=2e-6)


@pytest.mark.parametrize("kind", ["auto", "f16", "bf16", "q8_0"])
def test_types_of_matrices_are_as_asked_and_vectors_in_float32(tmp_path: Path, kind: str) -> None:
    model = save(tmp_path / "model", "qwen2", dtype=torch.bfloat16)
    reader = gguf.GGUFReader(export(tmp_path / "model", tmp_path / "model.gguf", "--type", kind))
    expected = "BF16" if kind == "auto" else kind.upper()
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1} == {expected}
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 1} == {"F32"}
    (down,) = (t for t in reader.tensors if t.name == "blk.0.ffn_down.weight")
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    right = model.model.layers[0].mlp.down_proj.weight.detach().float().numpy()
    np.testing.assert_allclose(values, right, atol={"q8_0": 0.01}.get(kind, 0), rtol=0)
    assert reader.get_field("tokenizer.chat_template").contents()


def test_a_merged_folder_is_what_its_adapter_made_it(tmp_path: Path) -> None:
    save(tmp_path / "model", "llama")
    model = adapted(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    ok("merge", "--model", tmp_path / "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "merged.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_written_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    save_model(tmp_path / "bytes")
    assert "no merges" in refused("export", tmp_path / "bytes", "--output", output)
    model = save(tmp_path / "model", "llama, tied")
    config = json.loads((tmp_path / "model/config.json").read_text())

    def changed(**settings: Any) -> str:
        (tmp_path / "model/config.json").write_text(json.dumps(config | settings))
        return refused("export", tmp_path / "model", "--output", output)

    assert "the model is GPT2LMHeadModel" in changed(architectures=["GPT2LMHeadModel"])
    assert "silu in llama models, the config 'gelu'" in changed(hidden_act="gelu")
    assert "'num_hidden_layers' to be a whole number above 0, found 'x'" in changed(num_hidden_layers="x")
    assert "no tensor for model.layers.1" in changed(num_hidden_layers=1)
    assert "'rope_parameters' to be an object, found 3" in changed(rope_parameters=3)
    assert "'rms_norm_eps' to be a number above 0, found -1.0" in changed(rms_norm_eps=-1.0)
    assert "64 rows, which 64 heads do not divide" in changed(num_attention_heads=64)
    assert "the model is None" in changed(architectures=None)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    packed = quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), NF4Config())
    packed.save_pretrained(tmp_path / "packed")
    assert "is stored quantized: merge it in 16 bits" in refused("export", tmp_path / "packed", "--output", output)
    adapted(tmp_path / "head", model, target_modules=["lm_head"])
    where = ("--output", output, "--base", tmp_path / "model")
    assert "lm_head, which llama.cpp ties" in refused("export", tmp_path / "head", *where)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted(tmp_path / "dora", other, use_dora=True)
    assert "use_dora is not read. Merge it" in refused("export", tmp_path / "dora", *where)
    assert "give --base DIR" in refused("export", tmp_path / "dora", "--output", output, "--base", tmp_path / "none")
    assert "--base goes with an adapter" in refused("export", tmp_path / "model", *where)
    assert "it is no model or adapter" in refused("export", tmp_path, "--output", output)
    assert "parent directory" in refused("export", tmp_path / "model", "--output", tmp_path / "no" / "x.gguf")
    assert not output.exists() and not list(tmp_path.glob(".x.gguf*"))
    output.write_text("mine")
    assert "exists: choose another name" in refused("export", tmp_path / "model", "--output", output)
    assert output.read_text() == "mine"


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    save(tmp_path / "model")
    tokenizer = tokenizer_of("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    sentence = refused("export", tmp_path / "model", "--output", tmp_path / "x.gguf")
    assert "none of gpt-2, smollm, llama-bpe, qwen2" in sentence and "Whitespace" in sentence


def test_a_window_that_llama_cpp_lacks_is_told(tmp_path: Path) -> None:
    save(tmp_path / "model", "mistral")
    said = ok("export", tmp_path / "model", "--output", tmp_path / "x.gguf")
    assert "no sliding window here: beyond 128 tokens" in said

"""Loading in NF4 never holds the dense model: measured in a fresh process on a model of 204 million parameters."""

import json
import os
import sys

import torch
from processes import run_process
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3MoeConfig

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 1024, 4096, 12, 1024
EXPERTS = 16
MIB = 2**20

# What is measured: anonymous memory (RssAnon), sampled every millisecond by a thread while the model loads, so
# heap and tensors. File pages are left out: transformers maps the checkpoint, and those pages are the kernel's
# cache, which it drops at need. For that reason the bfloat16 checkpoint is loaded in float32: every weight is
# then a copy on the heap before it is packed, and the dense model, loaded last, shows that the measure sees it.
# A small model is loaded first, so that imports and caches are in the baseline. glibc is told to give freed blocks
# of 64 KiB and more back at once: it would keep some of them, a different lot each time.
MEASURE = """
import gc, json, sys, threading, time
import torch
from transformers import AutoModelForCausalLM
from minipeft.nf4.hf import NF4Config

def anonymous():
    gc.collect()
    return current()

def current():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(folder, config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)

small, large = sys.argv[1:]
load(small, NF4Config())
samples, done = [], threading.Event()

def sample():
    while not done.is_set():
        samples.append(current())
        time.sleep(0.001)

baseline = anonymous()
thread = threading.Thread(target=sample)
thread.start()
model = load(large, NF4Config())
done.set()
thread.join()
final = anonymous()
nbytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
layer = str(model.model.layers[3].mlp)
del model
before = anonymous()
dense = load(large, None)
print(json.dumps({"peak": max(samples) - baseline, "final": final - baseline, "dense": anonymous() - before,
                  "samples": len(samples), "model": nbytes, "layer": layer}))
"""


def write_llama(folder, layers, hidden, intermediate, vocab):
    """A bfloat16 Llama checkpoint, one shard a layer, all layers alike; returns its number of parameters."""
    folder.mkdir()
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=vocab,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)

    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    shapes |= {f"{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    return write_shards(folder, layers, shapes, vocab, hidden)


def write_mixture(folder, layers, hidden, intermediate, vocab):
    """A bfloat16 Qwen3-MoE checkpoint with its experts one by one, as on the hub; returns its number of parameters."""
    folder.mkdir()
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
        vocab_size=vocab,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"self_attn.{name}_norm": (hidden // 8,) for name in "qk"} | {"mlp.gate": (EXPERTS, hidden)}
    for e in range(EXPERTS):
        shapes |= {f"mlp.experts.{e}.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"mlp.experts.{e}.down_proj": (hidden, intermediate)}
    shapes |= {f"{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    return write_shards(folder, layers, shapes, vocab, hidden)


def random(*shape):
    return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def write_shards(folder, layers, shapes, vocab, hidden):
    layer = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    shards = [{f"model.layers.{i}.{name}": t for name, t in layer.items()} for i in range(layers)]
    names = ("model.embed_tokens.weight", "lm_head.weight")
    shards.append({**{name: random(vocab, hidden) for name in names}, "model.norm.weight": random(hidden)})
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(t.numel() for shard in shards for t in shard.values())


def measure(tmp_path, write, layers, hidden, intermediate):
    torch.manual_seed(0)
    write(tmp_path / "small", layers=1, hidden=64, intermediate=64, vocab=64)
    parameters = write(tmp_path / "large", layers, hidden, intermediate, VOCAB)
    done = run_process(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        },
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    print({k: f"{v / MIB:.1f} MiB" for k, v in measured.items() if k in ("peak", "final", "model", "dense")})
    assert measured["samples"] > 100
    assert measured["dense"] > 0.95 * 4 * parameters, "the measure must see a dense model"
    # 4 bits, not 32
    assert measured["model"] < 4 * parameters / 7
    assert measured["final"] < measured["model"] + 8 * MIB
    return parameters, measured


def test_peak_is_the_packed_model_and_one_dense_weight(tmp_path):
    parameters, measured = measure(tmp_path, write_llama, LAYERS, HIDDEN, INTERMEDIATE)
    assert parameters >= 200e6 and "up_proj): NF4Linear" in measured["layer"]
    # Beside the model itself, one weight in float32 and 8 MiB for everything else.
    assert measured["peak"] < measured["final"] + 4 * HIDDEN * INTERMEDIATE + 8 * MIB


def test_peak_of_a_mixture_is_the_packed_model_and_the_dense_experts_of_one_layer(tmp_path):
    hidden, intermediate, layers = 512, 1024, 8
    parameters, measured = measure(tmp_path, write_mixture, layers, hidden, intermediate)
    assert parameters >= 200e6 and "experts): NF4Qwen3MoeExperts" in measured["layer"]
    # gate_up_proj of all experts of a layer is quantized at a time; down_proj may have been read ahead by then.
    assert measured["peak"] < measured["final"] + 4 * EXPERTS * 3 * hidden * intermediate + 16 * MIB

"""QLoRA steps of a mixture with 7 billion weights (OLMoE-1B-7B's shape, random numbers) in 4 bits: memory and seconds.

    python -m benchmarks.mixture_7b [--folder DIR] [--layers 16] [--tokens 128] [--steps 3]

Writes a checkpoint as the hub has it, bfloat16 and expert by expert (14 GB of disk, removed at the end unless --folder
is given), loads it as a user would, with `NF4Config()`, attaches LoRA of rank 16 to all linear layers and experts, and
takes optimizer steps with gradient checkpointing. Memory is what the process itself has allocated (RssAnon and VmSwap),
without the pages of the files that it reads, which the system may drop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig

from minipeft import LoraConfig, NF4Config
from minipeft.compat import checkpoint_activations
from minipeft.machine import processor
from minipeft.train.methods import attach


class PeakMemory:
    """The most anonymous memory of this process while entered, asked for every 20 ms."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory that this process has allocated and written to, in bytes, also what the system has swapped out."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return sum(int(status.split(f"{name}:")[1].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


def write_checkpoint(folder: Path, config: OlmoeConfig) -> int:
    """Random weights by the hub's names, a file a layer. Returns: how many there are."""
    hidden, middle = config.hidden_size, config.intermediate_size
    pool = torch.randn(1 << 22).mul_(0.02).bfloat16()
    count = 0

    def random(rows: int, columns: int) -> Tensor:
        nonlocal count
        # Other numbers for each matrix, without drawing 7 billion.
        parts = [pool.roll(977 * (count + i)) for i in range(-(-rows * columns // pool.numel()))]
        count += rows * columns
        return torch.cat(parts)[: rows * columns].view(rows, columns).clone()

    def save(name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        return dict.fromkeys(tensors, name)

    index: dict[str, str] = {}
    ends = {
        "model.embed_tokens.weight": random(config.vocab_size, hidden),
        "lm_head.weight": random(config.vocab_size, hidden),
    }
    index |= save("ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    del ends
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        tensors = {f"{start}self_attn.{name}_proj.weight": random(hidden, hidden) for name in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        tensors |= {f"{start}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        tensors[f"{start}mlp.gate.weight"] = random(config.num_experts, hidden)
        for expert in range(config.num_experts):
            own = f"{start}mlp.experts.{expert}."
            tensors |= {f"{own}{name}_proj.weight": random(middle, hidden) for name in ("gate", "up")}
            tensors[f"{own}down_proj.weight"] = random(hidden, middle)
        index |= save(f"layer-{layer}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["OlmoeForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return count


def main() -> None:
    """Write, load, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is put, and stays")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minipeft-mixture-") as temporary:
        folder = args.folder or Path(temporary)
        config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_hidden_layers=args.layers)
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{write_checkpoint(folder, config) / 1e9:.2f} billion weights written to {folder}", flush=True)
        measure(folder, args.tokens, args.steps)


def measure(folder: Path, tokens: int, steps: int) -> None:
    """Load the model in `folder` in 4 bits, take `steps` optimizer steps on `tokens` tokens, and print their cost."""
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    start, before = time.perf_counter(), anonymous_bytes()
    with PeakMemory() as loading:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), dtype=torch.bfloat16)
    seconds, held = time.perf_counter() - start, anonymous_bytes() - before
    weights = model.num_parameters()
    print(
        f"loaded {weights / 1e9:.2f} billion weights in {seconds:.0f} s: {held / 1e9:.2f} GB, at most "
        f"{(loading.peak - before) / 1e9:.2f} GB while loading",
        flush=True,
    )
    model = attach(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    model.train()
    checkpoint_activations(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    for step in range(steps):
        start = time.perf_counter()
        with PeakMemory() as training:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        print(
            f"step {step + 1}: {tokens} tokens in {seconds:.1f} s, at most {training.peak / 1e9:.2f} GB in the process,"
            f" loss {loss.item():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

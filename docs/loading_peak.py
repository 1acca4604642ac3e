"""What each of several processes holds in memory of its own while a model is loaded, and afterwards.

    torchrun --nproc-per-node 2 docs/loading_peak.py MODEL [--quantize nf4] [--fsdp]

Anonymous memory (Linux's RssAnon), sampled every two milliseconds: heap and tensors. Pages of the checkpoint, which all
processes map, are the system's, once.
"""

import argparse
import threading
from pathlib import Path
from typing import Any

import torch

from minipeft import LoraConfig, get_peft_model
from minipeft.train import load_base_model
from minipeft.train.processes import join, shard


def anonymous() -> float:
    """MB of this process's own memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def measure(model: str, quantize: str | None = None, fsdp: bool = False, **loading: Any) -> dict[str, float]:
    """MB while the model is loaded and given LoRA, at most, and once it is sharded or not, beyond those of before."""
    processes = join()
    before, samples, done = anonymous(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(anonymous() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    adapted = load_base_model(model, quantize=quantize, device="cpu", **loading)
    adapted = get_peft_model(adapted, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    if fsdp and processes.count > 1:
        shard(adapted, "cpu")
    done.set()
    thread.join()
    result = {"peak": max(samples), "afterwards": anonymous() - before}
    if processes.count > 1:
        torch.distributed.barrier()
    processes.leave()
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a process holds while a model is loaded.")
    parser.add_argument("model")
    parser.add_argument("--quantize", choices=["nf4"])
    parser.add_argument("--fsdp", action="store_true")
    print({name: f"{size:.0f} MB" for name, size in measure(**vars(parser.parse_args())).items()}, flush=True)
